/*
 * qipsec: messages of IKE_SAs, our notifies and what is kept of theirs.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec_state.h"

#include <encoding/payloads/delete_payload.h>
#include <encoding/payloads/id_payload.h>
#include <encoding/payloads/nonce_payload.h>
#include <encoding/payloads/notify_payload.h>

/** Private-use status notifies (RFC 7296 section 3.10.1), free in strongSwan. */
#define NOTIFY_SUPPORT 40990
#define NOTIFY_CONFIRM 40991
/** Version in the data of NOTIFY_SUPPORT, after the magic. */
#define SUPPORT_VERSION 1
/** RFC 9370: carries further key exchanges of a CREATE_CHILD_SA. */
#define EXCHANGE_FOLLOWUP_KE 44

static listener_t this_ike;

/** A message that sets up a CHILD_SA, or answers such a one with success. */
static bool sets_up_child(message_t *message)
{
	return message->get_payload(message, PLV2_SECURITY_ASSOCIATION) &&
		   message->get_payload(message, PLV2_TS_INITIATOR);
}

/** Data of one of our notifies, after its magic; borrowed. */
static bool get_notify(message_t *message, notify_type_t type, chunk_t *data)
{
	notify_payload_t *notify = message->get_notify(message, type);

	if (!notify)
	{
		return FALSE;
	}
	*data = notify->get_notification_data(notify);
	if (data->len < sizeof(qi_magic) ||
		!memeq(data->ptr, qi_magic, sizeof(qi_magic)))
	{
		return FALSE;
	}
	*data = chunk_skip(*data, sizeof(qi_magic));
	return TRUE;
}

static void add_notify(message_t *message, notify_type_t type, chunk_t data)
{
	uint8_t buf[sizeof(qi_magic) + QI_CONFIRM_LEN];

	memcpy(buf, qi_magic, sizeof(qi_magic));
	memcpy(buf + sizeof(qi_magic), data.ptr, data.len);
	message->add_notify(message, FALSE, type,
						chunk_create(buf, sizeof(qi_magic) + data.len));
}

static void add_support(message_t *message)
{
	uint8_t version = SUPPORT_VERSION;

	add_notify(message, NOTIFY_SUPPORT, chunk_from_thing(version));
}

/** Keeps the IDi payload of the first IKE_AUTH message. */
static void stash_idi(qi_state_t *state, message_t *message)
{
	id_payload_t *payload;
	identification_t *id;

	payload = (id_payload_t*)message->get_payload(message, PLV2_ID_INITIATOR);
	if (payload && !state->idi.len)
	{
		id = payload->get_identification(payload);
		if (id)
		{
			state->idi = qi_encode_id(id);
			id->destroy(id);
		}
	}
}

static void stash_confirm(chunk_t *to, message_t *message)
{
	chunk_t data;

	if (get_notify(message, NOTIFY_CONFIRM, &data) && data.len == QI_CONFIRM_LEN)
	{
		chunk_free(to);
		*to = chunk_clone(data);
	}
}

/** Says why an answer was ignored: once per request of ours, because whoever
 *  sees that request can forge answers without end. */
static void tell_ignored(ike_sa_t *ike_sa, qi_state_t *state, host_t *peer)
{
	qi_call_t call;

	if (state->told)
	{
		return;
	}
	state->told = TRUE;
	DBG1(DBG_IKE, "qipsec: connection '%s': IKE_SA_INIT answer of %H ignored: "
		 "the peer does not speak Q-IPsec (or the answer is forged)",
		 ike_sa->get_name(ike_sa), peer);
	qi_call_init(&call, QI_IGNORED);
	qi_put_sa(&call, ike_sa);
	qi_put_peer(&call, peer);
	qi_call_tell(&call);
	qi_call_done(&call);
}

static void init_in(ike_sa_t *ike_sa, qi_state_t *state, message_t *message)
{
	chunk_t data;

	state->speaks = get_notify(message, NOTIFY_SUPPORT, &data) && data.len &&
					data.ptr[0] == SUPPORT_VERSION;
	if (!message->get_request(message) && !state->speaks &&
		state->policy == QI_REQUIRED && !qi_off(ike_sa) &&
		!message->get_notify(message, COOKIE) &&
		!message->get_notify(message, INVALID_KE_PAYLOAD))
	{
		tell_ignored(ike_sa, state, message->get_source(message));
		message->set_exchange_type(message, EXCHANGE_TYPE_UNDEFINED);
		/* charon took the answer's SPI before it asked us, and would not find
		 * this IKE_SA again for another answer, the real peer's */
		ike_sa->get_id(ike_sa)->set_responder_spi(ike_sa->get_id(ike_sa), 0);
	}
}

#ifdef QI_REKEY_SPI
/** The CHILD_SA to which the peer sends by this SPI, if it was replaced with our
 *  consent and charon has forgotten that; NULL otherwise. */
static child_sa_t *forgotten(ike_sa_t *ike_sa, uint32_t spi)
{
	child_sa_t *old, *replacement;

	old = ike_sa->get_child_sa(ike_sa, PROTO_ESP, spi, FALSE);
	if (!old || old->get_state(old) != CHILD_INSTALLED ||
		!old->get_rekey_spi(old))
	{
		return NULL;
	}
	replacement = ike_sa->get_child_sa(ike_sa, PROTO_ESP,
									   old->get_rekey_spi(old), FALSE);
	return replacement && replacement->get_state(replacement) == CHILD_INSTALLED
				? old : NULL;
}

/** When both ends rekey a CHILD_SA at once and the peer refuses ours (for want of
 *  the key, say), charon sets it from REKEYED back to INSTALLED. Then the peer,
 *  whose rekeying we had accepted, deletes it, and charon would take that for the
 *  end of a CHILD_SA that nothing replaces: the outbound policies of the
 *  replacement would never come. charon asks us of the DELETE before it acts on it;
 *  REKEYED again, all takes its usual way and no packet is lost. */
static void delete_in(ike_sa_t *ike_sa, message_t *message)
{
	enumerator_t *payloads, *spis;
	payload_t *payload;
	delete_payload_t *delete;
	child_sa_t *old;
	uint32_t spi;

	payloads = message->create_payload_enumerator(message);
	while (payloads->enumerate(payloads, &payload))
	{
		delete = (delete_payload_t*)payload;
		if (payload->get_type(payload) != PLV2_DELETE ||
			delete->get_protocol_id(delete) != PROTO_ESP)
		{
			continue;
		}
		spis = delete->create_spi_enumerator(delete);
		while (spis->enumerate(spis, &spi))
		{
			old = forgotten(ike_sa, spi);
			if (old)
			{
				DBG1(DBG_IKE, "qipsec: connection '%s': CHILD_SA %s{%d} was "
					 "replaced by the peer while it refused our own rekeying",
					 ike_sa->get_name(ike_sa), old->get_name(old),
					 old->get_unique_id(old));
				old->set_state(old, CHILD_REKEYED);
			}
		}
		spis->destroy(spis);
	}
	payloads->destroy(payloads);
}
#endif

static void message_in(ike_sa_t *ike_sa, qi_state_t *state, message_t *message)
{
	exchange_type_t exchange = message->get_exchange_type(message);
	bool request = message->get_request(message);

	switch ((int)exchange)
	{
		case IKE_SA_INIT:
			init_in(ike_sa, state, message);
			break;
		case IKE_AUTH:
		case CREATE_CHILD_SA:
			state->responder = request;
			state->exchange = exchange;
			if (!request)
			{
				chunk_free(&state->c_r);
				stash_confirm(&state->c_r, message);
				break;
			}
			if (exchange == IKE_AUTH)
			{
				stash_idi(state, message);
			}
			else
			{	/* one of an earlier exchange; IKE_AUTH may take several rounds */
				chunk_free(&state->c_i);
			}
			stash_confirm(&state->c_i, message);
			break;
		case EXCHANGE_FOLLOWUP_KE:
			/* the end of a CREATE_CHILD_SA; one of the other side may have
			 * come between */
			state->responder = request;
			state->exchange = CREATE_CHILD_SA;
			if (!request)
			{
				stash_confirm(&state->c_r, message);
			}
			break;
#ifdef QI_REKEY_SPI
		case INFORMATIONAL:
			if (request)
			{
				delete_in(ike_sa, message);
			}
			break;
#endif
		default:
			break;
	}
}

/** Our request for a CHILD_SA is about to leave: the key is spent, C_i added. */
static void send_child(ike_sa_t *ike_sa, qi_state_t *state, message_t *message)
{
	exchange_type_t exchange = message->get_exchange_type(message);
	chunk_t ni = state->ni, id, c_i;
	nonce_payload_t *payload;
	chunk_t mine = chunk_empty;
	qi_call_t call;
	bool good;

	state->failed = FALSE;
	if (exchange == CREATE_CHILD_SA)
	{
		payload = (nonce_payload_t*)message->get_payload(message, PLV2_NONCE);
		ni = payload ? payload->get_nonce(payload) : chunk_empty;
		mine = qi_encode_id(ike_sa->get_my_id(ike_sa));
	}
	if (state->speaks && qi_key_id_of(ni, &id))
	{
		qi_call_init(&call, QI_SENT);
		qi_put_sa(&call, ike_sa);
		qi_put(&call, QI_T_KEY_ID, id.ptr, id.len);
		qi_put_spis(&call, ike_sa);
		qi_put(&call, QI_T_NI, ni.ptr, ni.len);
		qi_put_id(&call, QI_T_INITIATOR_ID, mine.len ? mine : state->idi);
		qi_put_u8(&call, QI_T_EXCHANGE, exchange);
		good = qi_call_ok(&call);
		if (good && !qi_get(&call, QI_T_CONFIRM, QI_CONFIRM_LEN, QI_CONFIRM_LEN,
							&c_i))
		{
			strcpy(call.why, "qipsecd's answer to SENT is incomplete");
			good = FALSE;
		}
		if (good)
		{
			add_notify(message, NOTIFY_CONFIRM, c_i);
		}
		else
		{
			state->failed = TRUE;
			DBG1(DBG_IKE, "qipsec: connection '%s': no key confirmation for the "
				 "peer: %s", ike_sa->get_name(ike_sa), call.why);
		}
		qi_call_done(&call);
	}
	if (exchange == CREATE_CHILD_SA)
	{
		chunk_clear(&ni);
	}
	chunk_free(&mine);
}

static void request_out(ike_sa_t *ike_sa, qi_state_t *state, message_t *message)
{
	int exchange = message->get_exchange_type(message);
	nonce_payload_t *payload;
	chunk_t ni, id;

	if (exchange != IKE_SA_INIT)
	{	/* that one is sent again under the same ID, after COOKIE */
		state->sent = TRUE;
		state->sent_id = message->get_message_id(message);
	}
	switch (exchange)
	{
		case IKE_SA_INIT:
			add_support(message);
			state->told = FALSE;
			chunk_free(&state->ni);
			payload = (nonce_payload_t*)message->get_payload(message, PLV2_NONCE);
			if (payload)
			{
				ni = payload->get_nonce(payload);
				if (qi_key_id_of(ni, &id))
				{
					state->ni = ni;
				}
				else
				{
					chunk_free(&ni);
				}
			}
			break;
		case IKE_AUTH:
			stash_idi(state, message);
			/* fall through */
		case CREATE_CHILD_SA:
			if (sets_up_child(message))
			{
				send_child(ike_sa, state, message);
			}
			break;
		default:
			break;
	}
}

static void response_out(ike_sa_t *ike_sa, qi_state_t *state, message_t *message)
{
	int exchange = message->get_exchange_type(message);

	if (exchange == IKE_SA_INIT)
	{
		if (state->speaks &&
			message->get_payload(message, PLV2_SECURITY_ASSOCIATION))
		{
			add_support(message);
		}
	}
	else if (state->answer.len &&
			 (sets_up_child(message) || exchange == EXCHANGE_FOLLOWUP_KE))
	{
		add_notify(message, NOTIFY_CONFIRM, state->answer);
		DBG1(DBG_IKE, "qipsec: connection '%s': result sent to the initiator",
			 ike_sa->get_name(ike_sa));
	}
	chunk_free(&state->answer);
}

METHOD(listener_t, message_, bool,
	listener_t *this, ike_sa_t *ike_sa, message_t *message, bool incoming,
	bool plain)
{
	qi_state_t *state;

	if (plain && ike_sa && ike_sa->get_version(ike_sa) == IKEV2 &&
		!qi_off(ike_sa))
	{
		state = qi_state_get(ike_sa, TRUE);
		if (incoming)
		{
			message_in(ike_sa, state, message);
		}
		else if (message->get_request(message))
		{
			request_out(ike_sa, state, message);
		}
		else
		{
			response_out(ike_sa, state, message);
		}
	}
	return TRUE;
}

/** TRUE if the IKE_SA is about to send an IKE_SA_INIT request of its own; FALSE
 *  for one that takes the place of a rekeyed one. */
static bool begins(ike_sa_t *ike_sa)
{
	enumerator_t *enumerator;
	task_t *task;
	bool found = FALSE;

	enumerator = ike_sa->create_task_enumerator(ike_sa, TASK_QUEUE_ACTIVE);
	while (!found && enumerator->enumerate(enumerator, &task))
	{
		found = task->get_type(task) == TASK_IKE_INIT;
	}
	enumerator->destroy(enumerator);
	return found;
}

METHOD(listener_t, ike_state_change, bool,
	listener_t *this, ike_sa_t *ike_sa, ike_sa_state_t change)
{
	uint32_t uid = ike_sa->get_unique_id(ike_sa);
	qi_call_t call;

	if (change == IKE_CONNECTING && begins(ike_sa))
	{	/* charon starts the IKE_SA of a reauthentication, and of whatever else
		 * reestablishes one, with the old one as the thread's, which it sets
		 * again after */
		charon->bus->set_sa(charon->bus, ike_sa);
	}
	if (change == IKE_DESTROYING && qi_state_remove(uid))
	{
		qi_call_init(&call, QI_END);
		qi_put_u32(&call, QI_T_UID, uid);
		qi_call_tell(&call);
		qi_call_done(&call);
	}
	return TRUE;
}

/** No IKE_SA_INIT comes again: what it told of the peer is handed on. */
METHOD(listener_t, ike_rekey, bool,
	listener_t *this, ike_sa_t *old, ike_sa_t *new)
{
	qi_state_t *state = qi_state_get(old, FALSE);

	if (state)
	{
		qi_state_get(new, TRUE)->speaks = state->speaks;
	}
	return TRUE;
}

void qi_ike_start(void)
{
	this_ike = (listener_t){
		.message = _message_,
		.ike_state_change = _ike_state_change,
		.ike_rekey = _ike_rekey,
	};
	charon->bus->add_listener(charon->bus, &this_ike);
}

void qi_ike_stop(void)
{
	charon->bus->remove_listener(charon->bus, &this_ike);
}
