/*
 * plugin-asan: the scripted peer at the plugin's socket.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef PEER_H_
#define PEER_H_

#include <stdbool.h>
#include <stdint.h>

/** What the peer makes of the answer that qipsecd would give. */
typedef enum {
	ACT_GOOD,
	ACT_DOUBLE,        /**< sent twice */
	ACT_FULL,          /**< filled up to the largest frame with an unknown TLV */
	ACT_REFUSE,
	ACT_REFUSE_BARE,   /**< REFUSE without a text */
	ACT_REFUSE_LONG,   /**< REFUSE with a text longer than the plugin keeps */
	ACT_REFUSE_FORMAT, /**< REFUSE with directives of printf in its text */
	ACT_CLOSE,
	ACT_UNREAD,        /**< closed with the request unread */
	ACT_EMPTY,         /**< 0 bytes */
	ACT_STUB,          /**< 7 bytes */
	ACT_OVERSIZE,      /**< one byte more than the largest frame */
	ACT_MAGIC,
	ACT_ABI,
	ACT_ABI_REFUSE,    /**< REFUSE of another ABI */
	ACT_ZERO,          /**< the header's zero byte is not */
	ACT_NOISE,         /**< random bytes */
	ACT_KIND,          /**< an answer of another request */
	ACT_LATE,          /**< when the plugin has given up */
	/* from here on nothing is wrong if the answer needs no TLV */
	ACT_BARE,          /**< no TLVs */
	ACT_CUT,           /**< ends within the first TLV's header */
	ACT_TAIL,          /**< the last byte of the last TLV is missing */
	ACT_OVERRUN,       /**< the first TLV is longer than the frame */
	ACT_SHORTER,       /**< every TLV one byte shorter */
	ACT_LONGER,        /**< every TLV one byte longer */
	ACT_ALL,
	ACT_MUTATE = ACT_ALL, /**< some bytes changed or cut off at random */
	ACT_SLOW,          /**< good, after peer_setup.slow ms of its kind */
} act_t;

extern const char *const act_names[];

/** What the peer's good answers say. */
extern struct peer_setup {
	uint8_t policy;
	bool key;
	/** ADD is answered with USE_KEY */
	bool use_key;
	/** in ms, indexed by kind of request */
	int slow[256];
} peer_setup;

/** Text of ACT_REFUSE; bytes of the keys of USE_KEY. */
#define PEER_REFUSAL "refused by the script"
#define PEER_ENCR 0xe1
#define PEER_INTEG 0xe2

bool peer_start(const char *path);
void peer_stop(void);

/** Forgets script and counts, and sets peer_setup back. */
void peer_reset(void);

/** The nth request of this kind from now (0: each) is answered so. QI_ACK is
 *  the ACK within ADD. */
void peer_script(uint8_t kind, u_int nth, act_t act);

/** Requests of a kind since peer_reset(). */
u_int peer_count(uint8_t kind);

/** Those with a C_i or C_r. */
u_int peer_confirmed(uint8_t kind);

/** Waits up to 10 s for that many. */
bool peer_wait(uint8_t kind, u_int n);

/** Why a request was malformed; NULL: none was. */
const char *peer_complaint(void);

#endif /** PEER_H_ */
