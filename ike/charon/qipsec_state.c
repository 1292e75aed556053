/*
 * qipsec: what is kept of each IKE_SA, and what qipsecd is told of one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec_state.h"

#include <collections/hashtable.h>
#include <threading/mutex.h>

#define MAX_IDENTITY 1500

const uint8_t qi_magic[8] = { 'Q', '-', 'I', 'P', 's', 'e', 'c', 0x01 };

static struct {
	mutex_t *mutex;
	/** qi_state_t by unique id of the IKE_SA */
	hashtable_t *states;
} this_state;

static void *uid_key(uint32_t uid)
{
	return (void*)(uintptr_t)uid;
}

qi_state_t *qi_state_get(ike_sa_t *ike_sa, bool create)
{
	uint32_t uid = ike_sa->get_unique_id(ike_sa);
	qi_state_t *state;

	this_state.mutex->lock(this_state.mutex);
	state = this_state.states->get(this_state.states, uid_key(uid));
	if (!state && create)
	{
		INIT(state,
			.uid = uid,
		);
		this_state.states->put(this_state.states, uid_key(uid), state);
	}
	this_state.mutex->unlock(this_state.mutex);
	return state;
}

static void state_destroy(qi_state_t *state)
{
	chunk_free(&state->ni);
	chunk_free(&state->idi);
	chunk_free(&state->c_i);
	chunk_free(&state->c_r);
	chunk_free(&state->answer);
	free(state);
}

bool qi_state_remove(uint32_t uid)
{
	qi_state_t *state;
	bool asked = FALSE;

	this_state.mutex->lock(this_state.mutex);
	state = this_state.states->remove(this_state.states, uid_key(uid));
	this_state.mutex->unlock(this_state.mutex);
	if (state)
	{
		asked = state->asked;
		state_destroy(state);
	}
	return asked;
}

void qi_put_sa(qi_call_t *call, ike_sa_t *ike_sa)
{
	char *name = ike_sa->get_name(ike_sa);

	qi_put_u32(call, QI_T_UID, ike_sa->get_unique_id(ike_sa));
	qi_put(call, QI_T_CONNECTION, name, strlen(name));
}

void qi_put_peer(qi_call_t *call, host_t *peer)
{
	chunk_t addr = peer->get_address(peer);

	qi_put(call, QI_T_PEER, addr.ptr, addr.len);
}

void qi_put_spis(qi_call_t *call, ike_sa_t *ike_sa)
{
	ike_sa_id_t *id = ike_sa->get_id(ike_sa);
	uint64_t spi;

	spi = id->get_initiator_spi(id);
	qi_put(call, QI_T_SPI_I, &spi, sizeof(spi));
	spi = id->get_responder_spi(id);
	qi_put(call, QI_T_SPI_R, &spi, sizeof(spi));
}

chunk_t qi_encode_id(identification_t *id)
{
	uint8_t type = id->get_type(id);

	return chunk_cat("cc", chunk_from_thing(type), id->get_encoding(id));
}

void qi_put_id(qi_call_t *call, uint16_t tag, chunk_t id)
{
	if (id.len == 0 || id.len > MAX_IDENTITY)
	{
		call->frame.overflow = TRUE;
		return;
	}
	qi_put(call, tag, id.ptr, id.len);
}

bool qi_key_id_of(chunk_t ni, chunk_t *id)
{
	if (ni.len != QI_NI_LEN ||
		!memeq(ni.ptr + QI_RANDOM_LEN, qi_magic, sizeof(qi_magic)))
	{
		return FALSE;
	}
	*id = chunk_create(ni.ptr + QI_RANDOM_LEN + sizeof(qi_magic), QI_KEY_ID_LEN);
	return TRUE;
}

void qi_state_start(void)
{
	this_state.mutex = mutex_create(MUTEX_TYPE_DEFAULT);
	this_state.states = hashtable_create(hashtable_hash_ptr,
										 hashtable_equals_ptr, 32);
}

void qi_state_stop(void)
{
	enumerator_t *enumerator;
	qi_state_t *state;
	void *key;

	enumerator = this_state.states->create_enumerator(this_state.states);
	while (enumerator->enumerate(enumerator, &key, &state))
	{
		state_destroy(state);
	}
	enumerator->destroy(enumerator);
	this_state.states->destroy(this_state.states);
	this_state.mutex->destroy(this_state.mutex);
}
