/*
 * qipsec: Key-ID in Ni, notifies, derive_child_keys and its token.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

#include <errno.h>
#include <sys/random.h>

#include <collections/hashtable.h>
#include <crypto/nonce_gen.h>
#include <encoding/payloads/id_payload.h>
#include <encoding/payloads/nonce_payload.h>
#include <encoding/payloads/notify_payload.h>
#include <sa/ikev2/keymat_v2.h>
#include <threading/mutex.h>

/** Private-use status notifies (RFC 7296 section 3.10.1), free in strongSwan. */
#define NOTIFY_SUPPORT 40990
#define NOTIFY_CONFIRM 40991
/** Version in the data of NOTIFY_SUPPORT, after the magic. */
#define SUPPORT_VERSION 1
/** RFC 9370: carries further key exchanges of a CREATE_CHILD_SA. */
#define EXCHANGE_FOLLOWUP_KE 44

/** First in the data of both notifies; in Ni between random part and Key-ID. */
static const uint8_t magic[8] = { 'Q', '-', 'I', 'P', 's', 'e', 'c', 0x01 };

#define RANDOM_LEN 32
#define KEY_ID_LEN 16
#define NI_LEN (RANDOM_LEN + sizeof(magic) + KEY_ID_LEN)
#define CONFIRM_LEN 32
#define MAX_IDENTITY 1500
#define MAX_CHUNK 128

/** What is kept of one IKE_SA. charon has it checked out in one thread at a
 *  time, and that thread is the only user of its entry. */
typedef struct {
	uint32_t uid;
	/** qipsecd was asked for a key: it is told of the end */
	bool asked;
	/** policy of the last GETKEY; 0: none yet */
	uint8_t policy;
	/** the peer sent the support notify */
	bool speaks;
	/** an answer to our IKE_SA_INIT request was ignored, and that was told */
	bool told;
	/** a request of the peer is being answered: nonces are Nr */
	bool answering;
	/** last incoming message of an exchange that sets up a CHILD_SA */
	bool responder;
	uint8_t exchange;
	/** SENT failed: the CHILD_SA we asked for is refused without asking qipsecd */
	bool failed;
	/** our Ni of IKE_SA_INIT if it carries a Key-ID */
	chunk_t ni;
	/** type and data of the IDi payload of the first IKE_AUTH message */
	chunk_t idi;
	/** confirmations: in the peer's request, in its response, for our response */
	chunk_t c_i;
	chunk_t c_r;
	chunk_t answer;
} state_t;

static struct {
	mutex_t *mutex;
	/** state_t by unique id of the IKE_SA */
	hashtable_t *states;
	listener_t listener;
	/** those of every stock keymat_v2_t, which are the same */
	nonce_gen_t *(*create_nonce_gen)(keymat_t *this);
	bool (*derive)(keymat_v2_t *this, proposal_t *proposal, void *ke,
				   chunk_t nonce_i, chunk_t nonce_r, chunk_t *encr_i,
				   chunk_t *integ_i, chunk_t *encr_r, chunk_t *integ_r);
} this_ike;

/** Nonce generator that puts a Key-ID into Ni. It may outlive its keymat. */
typedef struct {
	nonce_gen_t public;
	nonce_gen_t *stock;
} nonce_gen_qi_t;

static void *uid_key(uint32_t uid)
{
	return (void*)(uintptr_t)uid;
}

static state_t *get_state(ike_sa_t *ike_sa, bool create)
{
	uint32_t uid = ike_sa->get_unique_id(ike_sa);
	state_t *state;

	this_ike.mutex->lock(this_ike.mutex);
	state = this_ike.states->get(this_ike.states, uid_key(uid));
	if (!state && create)
	{
		INIT(state,
			.uid = uid,
		);
		this_ike.states->put(this_ike.states, uid_key(uid), state);
	}
	this_ike.mutex->unlock(this_ike.mutex);
	return state;
}

static void state_destroy(state_t *state)
{
	chunk_free(&state->ni);
	chunk_free(&state->idi);
	chunk_free(&state->c_i);
	chunk_free(&state->c_r);
	chunk_free(&state->answer);
	free(state);
}

static void put_sa(qi_call_t *call, ike_sa_t *ike_sa)
{
	char *name = ike_sa->get_name(ike_sa);

	qi_put_u32(call, QI_T_UID, ike_sa->get_unique_id(ike_sa));
	qi_put(call, QI_T_CONNECTION, name, strlen(name));
}

static void put_peer(qi_call_t *call, host_t *peer)
{
	chunk_t addr = peer->get_address(peer);

	qi_put(call, QI_T_PEER, addr.ptr, addr.len);
}

static void put_spis(qi_call_t *call, ike_sa_t *ike_sa)
{
	ike_sa_id_t *id = ike_sa->get_id(ike_sa);
	uint64_t spi;

	spi = id->get_initiator_spi(id);
	qi_put(call, QI_T_SPI_I, &spi, sizeof(spi));
	spi = id->get_responder_spi(id);
	qi_put(call, QI_T_SPI_R, &spi, sizeof(spi));
}

/** Type byte and data of an identity, as in its payload. Caller frees. */
static chunk_t encode_id(identification_t *id)
{
	uint8_t type = id->get_type(id);

	return chunk_cat("cc", chunk_from_thing(type), id->get_encoding(id));
}

static void put_id(qi_call_t *call, uint16_t tag, chunk_t id)
{
	if (id.len == 0 || id.len > MAX_IDENTITY)
	{
		call->frame.overflow = TRUE;
		return;
	}
	qi_put(call, tag, id.ptr, id.len);
}

/** The Key-ID in a nonce; FALSE if it carries none. */
static bool key_id_of(chunk_t ni, chunk_t *id)
{
	if (ni.len != NI_LEN || !memeq(ni.ptr + RANDOM_LEN, magic, sizeof(magic)))
	{
		return FALSE;
	}
	*id = chunk_create(ni.ptr + RANDOM_LEN + sizeof(magic), KEY_ID_LEN);
	return TRUE;
}

/** Text form of a Key-ID for messages, 37 bytes with its end. */
static char *uuid(chunk_t id, char text[37])
{
	static const char hex[] = "0123456789abcdef";
	char *pos = text;
	u_int i;

	for (i = 0; i < KEY_ID_LEN; i++)
	{
		if (i == 4 || i == 6 || i == 8 || i == 10)
		{
			*pos++ = '-';
		}
		*pos++ = hex[id.ptr[i] >> 4];
		*pos++ = hex[id.ptr[i] & 15];
	}
	*pos = '\0';
	return text;
}

/** TRUE if the nonce about to be made is Ni of a CHILD_SA that we ask for. An
 *  IKE_SA rekey, an IKE_SA without child and every answer keep stock nonces. */
static bool wants_key(ike_sa_t *ike_sa, state_t *state)
{
	enumerator_t *enumerator;
	task_t *task;
	bool found = FALSE;

	if (state->answering || ike_sa->get_version(ike_sa) != IKEV2)
	{
		return FALSE;
	}
	if (ike_sa->get_state(ike_sa) == IKE_ESTABLISHED && !state->speaks)
	{	/* nobody would understand the Key-ID; BIND decides what becomes of it */
		return FALSE;
	}
	enumerator = ike_sa->create_task_enumerator(ike_sa, TASK_QUEUE_ACTIVE);
	while (!found && enumerator->enumerate(enumerator, &task))
	{
		found = task->get_type(task) == TASK_CHILD_CREATE ||
				task->get_type(task) == TASK_CHILD_REKEY;
	}
	enumerator->destroy(enumerator);
	return found;
}

/** Asks for a Key-ID; FALSE: the exchange may not start. An empty key_id means
 *  a stock nonce. */
static bool get_key(ike_sa_t *ike_sa, state_t *state, uint8_t key_id[KEY_ID_LEN],
					bool *have)
{
	qi_call_t call;
	chunk_t value;
	bool good;

	state->asked = TRUE;
	qi_call_init(&call, QI_GETKEY);
	put_sa(&call, ike_sa);
	put_peer(&call, ike_sa->get_other_host(ike_sa));
	good = qi_call_ok(&call);
	if (good && !qi_get(&call, QI_T_POLICY, 1, 1, &value))
	{
		strcpy(call.why, "qipsecd's answer to GETKEY is incomplete");
		good = FALSE;
	}
	if (good)
	{
		state->policy = *value.ptr;
		*have = qi_get(&call, QI_T_KEY_ID, KEY_ID_LEN, KEY_ID_LEN, &value);
		if (*have)
		{
			memcpy(key_id, value.ptr, KEY_ID_LEN);
		}
		else if (state->policy != QI_OPTIONAL)
		{
			strcpy(call.why, "qipsecd gave no Key-ID");
			good = FALSE;
		}
	}
	if (!good)
	{
		DBG1(DBG_IKE, "qipsec: connection '%s': no quantum key, nothing sent: %s",
			 ike_sa->get_name(ike_sa), call.why);
	}
	qi_call_done(&call);
	return good;
}

METHOD(nonce_gen_t, get_nonce, bool,
	nonce_gen_qi_t *this, size_t size, uint8_t *buffer)
{
	return this->stock->get_nonce(this->stock, size, buffer);
}

METHOD(nonce_gen_t, allocate_nonce, bool,
	nonce_gen_qi_t *this, size_t size, chunk_t *chunk)
{
	ike_sa_t *ike_sa = charon->bus->get_sa(charon->bus);
	uint8_t key_id[KEY_ID_LEN];
	bool have = FALSE;
	state_t *state;
	char text[37];

	if (!ike_sa || qi_off(ike_sa))
	{
		return this->stock->allocate_nonce(this->stock, size, chunk);
	}
	state = get_state(ike_sa, TRUE);
	if (wants_key(ike_sa, state))
	{
		if (qi_unfit())
		{
			DBG1(DBG_IKE, "qipsec: connection '%s': nothing sent: %s",
				 ike_sa->get_name(ike_sa), qi_unfit());
			return FALSE;
		}
		if (!get_key(ike_sa, state, key_id, &have))
		{
			return FALSE;
		}
	}
	if (!have)
	{
		return this->stock->allocate_nonce(this->stock, size, chunk);
	}
	*chunk = chunk_alloc(NI_LEN);
	if (!this->stock->get_nonce(this->stock, RANDOM_LEN, chunk->ptr))
	{
		chunk_free(chunk);
		return FALSE;
	}
	memcpy(chunk->ptr + RANDOM_LEN, magic, sizeof(magic));
	memcpy(chunk->ptr + RANDOM_LEN + sizeof(magic), key_id, KEY_ID_LEN);
	DBG1(DBG_IKE, "qipsec: connection '%s': Key-ID %s in nonce",
		 ike_sa->get_name(ike_sa), uuid(chunk_from_thing(key_id), text));
	return TRUE;
}

METHOD(nonce_gen_t, nonce_gen_destroy, void,
	nonce_gen_qi_t *this)
{
	this->stock->destroy(this->stock);
	free(this);
}

static nonce_gen_t *create_nonce_gen(keymat_t *keymat)
{
	nonce_gen_t *stock = this_ike.create_nonce_gen(keymat);
	nonce_gen_qi_t *this;

	if (!stock)
	{
		return NULL;
	}
	INIT(this,
		.public = {
			.get_nonce = _get_nonce,
			.allocate_nonce = _allocate_nonce,
			.destroy = _nonce_gen_destroy,
		},
		.stock = stock,
	);
	return &this->public;
}

static bool overwrite(chunk_t chunk)
{
	if (chunk.len > MAX_CHUNK ||
		getrandom(chunk.ptr, chunk.len, 0) != (ssize_t)chunk.len)
	{
		memwipe(chunk.ptr, chunk.len);
		return FALSE;
	}
	return TRUE;
}

/** Puts the four chunks into the call, and then random bytes, the token, into
 *  the chunks and the call. On error the chunks are zero or random. */
static bool tokenise(qi_call_t *call, chunk_t *chunks[4])
{
	bool good = TRUE;
	u_int i;

	for (i = 0; i < 4; i++)
	{
		if (chunks[i]->len && chunks[i]->len <= MAX_CHUNK)
		{
			qi_put(call, QI_T_KEYMAT_EI + i, chunks[i]->ptr, chunks[i]->len);
		}
		good = overwrite(*chunks[i]) && good;
		if (good && chunks[i]->len)
		{
			qi_put(call, QI_T_TOKEN_EI + i, chunks[i]->ptr, chunks[i]->len);
		}
	}
	if (!good)
	{
		strcpy(call->why, "keys too long or no random bytes for the token");
	}
	return good;
}

static void put_transforms(qi_call_t *call, proposal_t *proposal)
{
	uint16_t encr = 0, bits = 0, integ = 0, esn = NO_EXT_SEQ_NUMBERS;
	uint8_t value[8];

	proposal->get_algorithm(proposal, ENCRYPTION_ALGORITHM, &encr, &bits);
	proposal->get_algorithm(proposal, INTEGRITY_ALGORITHM, &integ, NULL);
	proposal->get_algorithm(proposal, EXTENDED_SEQUENCE_NUMBERS, &esn, NULL);
	value[0] = proposal->get_protocol(proposal);
	htoun16(value + 1, encr);
	htoun16(value + 3, bits);
	htoun16(value + 5, integ);
	value[7] = esn == EXT_SEQ_NUMBERS;
	qi_put(call, QI_T_TRANSFORMS, value, sizeof(value));
}

static void put_identities(qi_call_t *call, ike_sa_t *ike_sa, state_t *state)
{
	chunk_t mine = encode_id(ike_sa->get_my_id(ike_sa));
	chunk_t theirs = encode_id(ike_sa->get_other_id(ike_sa));
	chunk_t initiator = state->responder ? theirs : mine;

	put_id(call, QI_T_INITIATOR_ID, initiator);
	put_id(call, QI_T_REPLIER_ID, state->responder ? mine : theirs);
	put_id(call, QI_T_FIRST_IDI,
		   state->exchange == IKE_AUTH ? state->idi : initiator);
	chunk_free(&mine);
	chunk_free(&theirs);
}

/** Asks whether the CHILD_SA may be made. */
static bool bind_child(qi_call_t *call, ike_sa_t *ike_sa, state_t *state,
					   proposal_t *proposal, chunk_t nonce_i, chunk_t nonce_r,
					   chunk_t *chunks[4])
{
	chunk_t *confirm = state->responder ? &state->c_i : &state->c_r;
	chunk_t value;
	char text[37];

	put_sa(call, ike_sa);
	qi_put_u8(call, QI_T_RESPONDER, state->responder);
	if (key_id_of(nonce_i, &value))
	{
		qi_put(call, QI_T_KEY_ID, value.ptr, value.len);
		if (state->responder)
		{
			DBG1(DBG_IKE, "qipsec: connection '%s': nonce received with Key-ID %s",
				 ike_sa->get_name(ike_sa), uuid(value, text));
		}
	}
	qi_put(call, QI_T_NI, nonce_i.ptr, nonce_i.len);
	qi_put(call, QI_T_NR, nonce_r.ptr, nonce_r.len);
	put_spis(call, ike_sa);
	put_identities(call, ike_sa, state);
	qi_put_u8(call, QI_T_EXCHANGE, state->exchange);
	put_transforms(call, proposal);
	if (confirm->len)
	{
		qi_put(call, QI_T_CONFIRM, confirm->ptr, confirm->len);
	}
	qi_put_u8(call, QI_T_PEER_SPEAKS, state->speaks);
	if (!qi_call_ok(call))
	{
		return FALSE;
	}
	if (!qi_expect(*chunks[0], *chunks[1], *chunks[2], *chunks[3]))
	{
		strcpy(call->why, "the token cannot be used");
		return FALSE;
	}
	if (state->responder && qi_get(call, QI_T_CONFIRM, CONFIRM_LEN, CONFIRM_LEN,
								   &value))
	{
		state->answer = chunk_clone(value);
	}
	return TRUE;
}

/** The KEYMAT hook: whatever the answer, charon keeps no key that works. */
static bool derive_child_keys(keymat_v2_t *this, proposal_t *proposal, void *ke,
							  chunk_t nonce_i, chunk_t nonce_r, chunk_t *encr_i,
							  chunk_t *integ_i, chunk_t *encr_r, chunk_t *integ_r)
{
	ike_sa_t *ike_sa = charon->bus->get_sa(charon->bus);
	chunk_t *chunks[] = { encr_i, integ_i, encr_r, integ_r };
	state_t *state = ike_sa ? get_state(ike_sa, FALSE) : NULL;
	qi_call_t call;
	bool good;

	if (!this_ike.derive(this, proposal, ke, nonce_i, nonce_r,
						 encr_i, integ_i, encr_r, integ_r))
	{
		return FALSE;
	}
	if (ike_sa && qi_off(ike_sa))
	{
		return TRUE;
	}
	qi_call_init(&call, QI_BIND);
	good = tokenise(&call, chunks);
	if (good && (qi_unfit() || !state || !state->exchange ||
				 (state->failed && !state->responder)))
	{
		snprintf(call.why, sizeof(call.why), "%s", qi_unfit() ?:
				 !state || !state->exchange ? "its exchange was not seen" :
				 "an earlier call of this exchange failed");
		good = FALSE;
	}
	if (state)
	{
		chunk_free(&state->answer);
	}
	good = good && bind_child(&call, ike_sa, state, proposal, nonce_i, nonce_r,
							  chunks);
	if (!good)
	{
		DBG1(DBG_IKE, "qipsec: connection '%s': CHILD_SA refused: %s",
			 ike_sa ? ike_sa->get_name(ike_sa) : "?", call.why);
	}
	if (state)
	{	/* each serves once */
		chunk_free(state->responder ? &state->c_i : &state->c_r);
		state->exchange = 0;
	}
	qi_call_done(&call);
	return good;
}

keymat_t *qi_keymat_create(bool initiator)
{
	keymat_v2_t *keymat = keymat_v2_create(initiator);

	if (keymat)
	{
		this_ike.create_nonce_gen = keymat->keymat.create_nonce_gen;
		this_ike.derive = (void*)keymat->derive_child_keys;
		keymat->keymat.create_nonce_gen = create_nonce_gen;
		keymat->derive_child_keys = (void*)derive_child_keys;
	}
	return &keymat->keymat;
}

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
	if (data->len < sizeof(magic) || !memeq(data->ptr, magic, sizeof(magic)))
	{
		return FALSE;
	}
	*data = chunk_skip(*data, sizeof(magic));
	return TRUE;
}

static void add_notify(message_t *message, notify_type_t type, chunk_t data)
{
	uint8_t buf[sizeof(magic) + CONFIRM_LEN];

	memcpy(buf, magic, sizeof(magic));
	memcpy(buf + sizeof(magic), data.ptr, data.len);
	message->add_notify(message, FALSE, type,
						chunk_create(buf, sizeof(magic) + data.len));
}

static void add_support(message_t *message)
{
	uint8_t version = SUPPORT_VERSION;

	add_notify(message, NOTIFY_SUPPORT, chunk_from_thing(version));
}

/** Keeps the IDi payload of the first IKE_AUTH message. */
static void stash_idi(state_t *state, message_t *message)
{
	id_payload_t *payload;
	identification_t *id;

	payload = (id_payload_t*)message->get_payload(message, PLV2_ID_INITIATOR);
	if (payload && !state->idi.len)
	{
		id = payload->get_identification(payload);
		if (id)
		{
			state->idi = encode_id(id);
			id->destroy(id);
		}
	}
}

static void stash_confirm(chunk_t *to, message_t *message)
{
	chunk_t data;

	if (get_notify(message, NOTIFY_CONFIRM, &data) && data.len == CONFIRM_LEN)
	{
		chunk_free(to);
		*to = chunk_clone(data);
	}
}

/** Says why an answer was ignored: once per request of ours, because whoever
 *  sees that request can forge answers without end. */
static void tell_ignored(ike_sa_t *ike_sa, state_t *state, host_t *peer)
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
	put_sa(&call, ike_sa);
	put_peer(&call, peer);
	qi_call_tell(&call);
	qi_call_done(&call);
}

static void init_in(ike_sa_t *ike_sa, state_t *state, message_t *message)
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

static void message_in(ike_sa_t *ike_sa, state_t *state, message_t *message)
{
	exchange_type_t exchange = message->get_exchange_type(message);
	bool request = message->get_request(message);

	state->answering = request;
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
			if (!request)
			{
				stash_confirm(&state->c_r, message);
			}
			break;
		default:
			break;
	}
}

/** Our request for a CHILD_SA is about to leave: the key is spent, C_i added. */
static void send_child(ike_sa_t *ike_sa, state_t *state, message_t *message)
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
		mine = encode_id(ike_sa->get_my_id(ike_sa));
	}
	if (state->speaks && key_id_of(ni, &id))
	{
		qi_call_init(&call, QI_SENT);
		put_sa(&call, ike_sa);
		qi_put(&call, QI_T_KEY_ID, id.ptr, id.len);
		put_spis(&call, ike_sa);
		qi_put(&call, QI_T_NI, ni.ptr, ni.len);
		put_id(&call, QI_T_INITIATOR_ID, mine.len ? mine : state->idi);
		qi_put_u8(&call, QI_T_EXCHANGE, exchange);
		good = qi_call_ok(&call);
		if (good && !qi_get(&call, QI_T_CONFIRM, CONFIRM_LEN, CONFIRM_LEN, &c_i))
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

static void request_out(ike_sa_t *ike_sa, state_t *state, message_t *message)
{
	nonce_payload_t *payload;
	chunk_t ni, id;

	switch ((int)message->get_exchange_type(message))
	{
		case IKE_SA_INIT:
			add_support(message);
			state->told = FALSE;
			chunk_free(&state->ni);
			payload = (nonce_payload_t*)message->get_payload(message, PLV2_NONCE);
			if (payload)
			{
				ni = payload->get_nonce(payload);
				if (key_id_of(ni, &id))
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

static void response_out(ike_sa_t *ike_sa, state_t *state, message_t *message)
{
	int exchange = message->get_exchange_type(message);

	state->answering = FALSE;
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
	state_t *state;

	if (plain && ike_sa && ike_sa->get_version(ike_sa) == IKEV2 &&
		!qi_off(ike_sa))
	{
		state = get_state(ike_sa, TRUE);
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
	state_t *state;
	qi_call_t call;

	if (change == IKE_CONNECTING && begins(ike_sa))
	{	/* charon starts the IKE_SA of a reauthentication, and of whatever else
		 * reestablishes one, with the old one as the thread's, which it sets
		 * again after */
		charon->bus->set_sa(charon->bus, ike_sa);
	}
	if (change != IKE_DESTROYING)
	{
		return TRUE;
	}
	this_ike.mutex->lock(this_ike.mutex);
	state = this_ike.states->remove(this_ike.states, uid_key(uid));
	this_ike.mutex->unlock(this_ike.mutex);
	if (state)
	{
		if (state->asked)
		{
			qi_call_init(&call, QI_END);
			qi_put_u32(&call, QI_T_UID, uid);
			qi_call_tell(&call);
			qi_call_done(&call);
		}
		state_destroy(state);
	}
	return TRUE;
}

/** No IKE_SA_INIT comes again: what it told of the peer is handed on. */
METHOD(listener_t, ike_rekey, bool,
	listener_t *this, ike_sa_t *old, ike_sa_t *new)
{
	state_t *state = get_state(old, FALSE);

	if (state)
	{
		get_state(new, TRUE)->speaks = state->speaks;
	}
	return TRUE;
}

bool qi_ike_start(void)
{
	this_ike.mutex = mutex_create(MUTEX_TYPE_DEFAULT);
	this_ike.states = hashtable_create(hashtable_hash_ptr, hashtable_equals_ptr,
									   32);
	this_ike.listener = (listener_t){
		.message = _message_,
		.ike_state_change = _ike_state_change,
		.ike_rekey = _ike_rekey,
	};
	charon->bus->add_listener(charon->bus, &this_ike.listener);
	return TRUE;
}

void qi_ike_stop(void)
{
	enumerator_t *enumerator;
	state_t *state;
	void *key;

	if (!this_ike.states)
	{
		return;
	}
	charon->bus->remove_listener(charon->bus, &this_ike.listener);
	enumerator = this_ike.states->create_enumerator(this_ike.states);
	while (enumerator->enumerate(enumerator, &key, &state))
	{
		state_destroy(state);
	}
	enumerator->destroy(enumerator);
	this_ike.states->destroy(this_ike.states);
	this_ike.states = NULL;
	this_ike.mutex->destroy(this_ike.mutex);
}
