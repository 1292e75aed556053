/*
 * qipsec: Key-ID in Ni, derive_child_keys and its token.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec_state.h"

#include <sys/random.h>

#include <crypto/nonce_gen.h>
#include <sa/ikev2/keymat_v2.h>

/** Largest key of charon that is taken, in bytes. */
#define MAX_CHUNK 128

/** Those of every stock keymat_v2_t, which are the same. */
static struct {
	nonce_gen_t *(*create_nonce_gen)(keymat_t *this);
	bool (*derive)(keymat_v2_t *this, proposal_t *proposal, void *ke,
				   chunk_t nonce_i, chunk_t nonce_r, chunk_t *encr_i,
				   chunk_t *integ_i, chunk_t *encr_r, chunk_t *integ_r);
} this_keymat;

/** Nonce generator that puts a Key-ID into Ni. It may outlive its keymat. */
typedef struct {
	nonce_gen_t public;
	nonce_gen_t *stock;
} nonce_gen_qi_t;

/** Text form of a Key-ID for messages, 37 bytes with its end. */
static char *uuid(chunk_t id, char text[37])
{
	static const char hex[] = "0123456789abcdef";
	char *pos = text;
	u_int i;

	for (i = 0; i < QI_KEY_ID_LEN; i++)
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

/** TRUE if our last request has no answer yet: charon counts its message ID on
 *  with the answer, also where it gives the request up. */
static bool under_way(ike_sa_t *ike_sa, qi_state_t *state)
{
	return state->sent &&
		   state->sent_id == ike_sa->get_message_id(ike_sa, TRUE);
}

/** TRUE if the nonce about to be made is Ni of a CHILD_SA that we ask for. An
 *  IKE_SA rekey, an IKE_SA without child and every answer keep stock nonces.
 *
 *  What is being handled does not tell: charon also begins a request within one
 *  of the peer's, before or while it answers. But it builds no request while one
 *  of ours is under way, and when none is, a task of a CHILD_SA is active only
 *  while its request is being built. */
static bool wants_key(ike_sa_t *ike_sa, qi_state_t *state)
{
	enumerator_t *enumerator;
	task_t *task;
	bool found = FALSE;

	if (ike_sa->get_version(ike_sa) != IKEV2 || under_way(ike_sa, state))
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
static bool get_key(ike_sa_t *ike_sa, qi_state_t *state,
					uint8_t key_id[QI_KEY_ID_LEN], bool *have)
{
	qi_call_t call;
	chunk_t value;
	bool good;

	state->asked = TRUE;
	qi_call_init(&call, QI_GETKEY);
	qi_put_sa(&call, ike_sa);
	qi_put_peer(&call, ike_sa->get_other_host(ike_sa));
	good = qi_call_ok(&call);
	if (good && !qi_get(&call, QI_T_POLICY, 1, 1, &value))
	{
		strcpy(call.why, "qipsecd's answer to GETKEY is incomplete");
		good = FALSE;
	}
	if (good)
	{
		state->policy = *value.ptr;
		*have = qi_get(&call, QI_T_KEY_ID, QI_KEY_ID_LEN, QI_KEY_ID_LEN, &value);
		if (*have)
		{
			memcpy(key_id, value.ptr, QI_KEY_ID_LEN);
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
	uint8_t key_id[QI_KEY_ID_LEN];
	bool have = FALSE;
	qi_state_t *state;
	char text[37];

	if (!ike_sa || qi_off(ike_sa))
	{
		return this->stock->allocate_nonce(this->stock, size, chunk);
	}
	state = qi_state_get(ike_sa, TRUE);
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
	*chunk = chunk_alloc(QI_NI_LEN);
	if (!this->stock->get_nonce(this->stock, QI_RANDOM_LEN, chunk->ptr))
	{
		chunk_free(chunk);
		return FALSE;
	}
	memcpy(chunk->ptr + QI_RANDOM_LEN, qi_magic, sizeof(qi_magic));
	memcpy(chunk->ptr + QI_RANDOM_LEN + sizeof(qi_magic), key_id, QI_KEY_ID_LEN);
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
	nonce_gen_t *stock = this_keymat.create_nonce_gen(keymat);
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

static void put_identities(qi_call_t *call, ike_sa_t *ike_sa, qi_state_t *state)
{
	chunk_t mine = qi_encode_id(ike_sa->get_my_id(ike_sa));
	chunk_t theirs = qi_encode_id(ike_sa->get_other_id(ike_sa));
	chunk_t initiator = state->responder ? theirs : mine;

	qi_put_id(call, QI_T_INITIATOR_ID, initiator);
	qi_put_id(call, QI_T_REPLIER_ID, state->responder ? mine : theirs);
	qi_put_id(call, QI_T_FIRST_IDI,
		   state->exchange == IKE_AUTH ? state->idi : initiator);
	chunk_free(&mine);
	chunk_free(&theirs);
}

/** Asks whether the CHILD_SA may be made. */
static bool bind_child(qi_call_t *call, ike_sa_t *ike_sa, qi_state_t *state,
					   proposal_t *proposal, chunk_t nonce_i, chunk_t nonce_r,
					   chunk_t *chunks[4])
{
	chunk_t *confirm = state->responder ? &state->c_i : &state->c_r;
	chunk_t value;
	char text[37];

	qi_put_sa(call, ike_sa);
	qi_put_u8(call, QI_T_RESPONDER, state->responder);
	if (qi_key_id_of(nonce_i, &value))
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
	qi_put_spis(call, ike_sa);
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
	if (state->responder &&
		qi_get(call, QI_T_CONFIRM, QI_CONFIRM_LEN, QI_CONFIRM_LEN, &value))
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
	qi_state_t *state = ike_sa ? qi_state_get(ike_sa, FALSE) : NULL;
	qi_call_t call;
	bool good;

	if (!this_keymat.derive(this, proposal, ke, nonce_i, nonce_r,
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
		this_keymat.create_nonce_gen = keymat->keymat.create_nonce_gen;
		this_keymat.derive = (void*)keymat->derive_child_keys;
		keymat->keymat.create_nonce_gen = create_nonce_gen;
		keymat->derive_child_keys = (void*)derive_child_keys;
	}
	return &keymat->keymat;
}
