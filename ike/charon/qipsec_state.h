/*
 * qipsec: what is kept of one IKE_SA, the nonce that carries a Key-ID, and the
 * TLVs that tell qipsecd of an IKE_SA.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QIPSEC_STATE_H_
#define QIPSEC_STATE_H_

#include "qipsec.h"

/** Ni with a Key-ID: random part, qi_magic, Key-ID; in bytes. */
#define QI_RANDOM_LEN 32
#define QI_KEY_ID_LEN 16
#define QI_NI_LEN (QI_RANDOM_LEN + sizeof(qi_magic) + QI_KEY_ID_LEN)
/** C_i and C_r, in bytes. */
#define QI_CONFIRM_LEN 32

/** First in the data of both notifies; in Ni between random part and Key-ID. */
extern const uint8_t qi_magic[8];

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
	/** we sent a request after IKE_SA_INIT; message ID of the last one */
	bool sent;
	uint32_t sent_id;
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
} qi_state_t;

/** The entry of an IKE_SA; NULL if there is none and create is FALSE. It is
 *  valid until qi_state_remove(), which charon's end of that IKE_SA calls. */
qi_state_t *qi_state_get(ike_sa_t *ike_sa, bool create);

/** Removes and frees the entry of an IKE_SA's unique id. TRUE if qipsecd had
 *  been asked for a key. */
bool qi_state_remove(uint32_t uid);

/** The Key-ID in a nonce, borrowed; FALSE if it carries none. */
bool qi_key_id_of(chunk_t ni, chunk_t *id);

/** Type byte and data of an identity, as in its payload. Caller frees. */
chunk_t qi_encode_id(identification_t *id);

/** Unique id and connection of an IKE_SA. */
void qi_put_sa(qi_call_t *call, ike_sa_t *ike_sa);

/** Address of the peer. */
void qi_put_peer(qi_call_t *call, host_t *peer);

/** Both SPIs of an IKE_SA, initiator's first. */
void qi_put_spis(qi_call_t *call, ike_sa_t *ike_sa);

/** An identity of qi_encode_id(). One that is empty or above 1500 bytes makes
 *  the call fail. */
void qi_put_id(qi_call_t *call, uint16_t tag, chunk_t id);

#endif /** QIPSEC_STATE_H_ */
