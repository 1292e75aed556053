/*
 * qipsec: charon's end of Q-IPsec.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * This program is free software; you can redistribute it and/or modify it
 * under the terms of the GNU General Public License as published by the
 * Free Software Foundation; either version 2 of the License, or (at your
 * option) any later version. See <http://www.fsf.org/copyleft/gpl.txt>.
 *
 * It is distributed in the hope that it will be useful, but WITHOUT ANY
 * WARRANTY; without even the implied warranty of MERCHANTABILITY or FITNESS
 * FOR A PARTICULAR PURPOSE. See the GNU General Public License for more
 * details.
 */

/*
 * The plugin holds no policy: it asks qipsecd (docs/plugin-protocol.md) and
 * refuses what qipsecd does not allow. Its parts:
 *
 *   qipsec_plugin.c    loading, taking and giving back the hooks
 *   qipsec_ike.c       messages of IKE_SAs: notifies, and what is kept of them
 *   qipsec_keymat.c    Key-ID in Ni, derive_child_keys and its token
 *   qipsec_kernel.c    add_sa, query_sa, update_sa
 *   qipsec_fields.c    what an SA may ask for that ADD does not carry
 *   qipsec_state.c     what is kept of each IKE_SA
 *   qipsec_socket.c    frames, calls with their limits, standing connection
 *   qipsec_settings.c  settings, and whether this charon can be worked with
 *
 * Each calls only those below it.
 */

#ifndef QIPSEC_H_
#define QIPSEC_H_

#include <daemon.h>

#include "qipsec_protocol.h"

/** One frame, being written or just read. It may hold keys: frame_wipe(). */
typedef struct {
	uint8_t b[QI_MAX_FRAME];
	size_t len;
	/** a TLV did not fit: the frame is never sent */
	bool overflow;
} qi_frame_t;

/** One call of qipsecd. qi_call_init(), the TLVs, qi_call_run(), qi_call_done(). */
typedef struct {
	qi_frame_t frame;
	int fd;
	/** of the request, for messages */
	const char *name;
	/** CLOCK_MONOTONIC, in ns */
	uint64_t deadline;
	/** type of the answer */
	uint8_t kind;
	/** why qi_call_run() or qi_call_next() gave FALSE; one line, no secrets */
	char why[512];
} qi_call_t;

/** Starts the plugin's standing connection, which tells qipsecd the setting
 *  `off` (or NULL). Both strings stay the caller's, off until qi_socket_stop().
 *  patience multiplies the limits of calls. */
bool qi_socket_start(const char *socket, const char *off, u_int patience);

/** Ends it and waits for its thread. */
void qi_socket_stop(void);

/** Opens a request. The deadline of the whole call begins here. */
void qi_call_init(qi_call_t *call, uint8_t kind);

/** Sends the request and reads the answer; FALSE: refused, failed or late. */
bool qi_call_run(qi_call_t *call);

/** The same, for a request that OK alone answers. */
bool qi_call_ok(qi_call_t *call);

/** Sends a frame without TLVs in the same call and reads the next answer. */
bool qi_call_next(qi_call_t *call, uint8_t kind);

/** Sends the request only, without ever waiting. */
void qi_call_tell(qi_call_t *call);

/** Closes and wipes. */
void qi_call_done(qi_call_t *call);

void qi_put(qi_call_t *call, uint16_t tag, const void *value, size_t len);
void qi_put_u8(qi_call_t *call, uint16_t tag, uint8_t value);
void qi_put_u16(qi_call_t *call, uint16_t tag, uint16_t value);
void qi_put_u32(qi_call_t *call, uint16_t tag, uint32_t value);
void qi_put_u64(qi_call_t *call, uint16_t tag, uint64_t value);

/** Finds a TLV of the answer, of min to max bytes; borrowed. */
bool qi_get(qi_call_t *call, uint16_t tag, size_t min, size_t max, chunk_t *value);

/** Number in a TLV of the answer, 8 bytes big-endian. */
bool qi_get_u64(qi_call_t *call, uint16_t tag, uint64_t *value);

/** The plugin's section of charon's settings. */
typedef struct {
	/** `off`: names of connections, separated by comma or space; NULL: none */
	char *off;
	char *socket;
	/** `patience`, 1 to 5 */
	u_int patience;
} qi_settings_t;

/** Reads the settings, once; qi_settings_free() ends the life of all strings. */
void qi_settings_load(void);
void qi_settings_free(void);
const qi_settings_t *qi_settings(void);

/** TRUE if the setting `off` names this connection. */
bool qi_off(ike_sa_t *ike_sa);

/** Why nothing may be set up in this charon; NULL if all is well. At first, that
 *  the hooks are not in place. */
const char *qi_unfit(void);

/** why is kept, not copied. */
void qi_set_unfit(const char *why);

/** The keymat hook, for keymat_register_constructor(). */
keymat_t *qi_keymat_create(bool initiator);

/** What qipsec_state.h declares, from before the first hook to after the last. */
void qi_state_start(void);
void qi_state_stop(void);

void qi_ike_start(void);
void qi_ike_stop(void);

void qi_kernel_start(void);
void qi_kernel_stop(void);

/** Why an SA may not be installed: a feature of newer versions that ADD has no TLV
 *  for. NULL: it may. */
const char *qi_not_carried(kernel_ipsec_add_sa_t *data);

/**
 * Announces the two tokens of a CHILD_SA to the add_sa hook, which takes each
 * once, soon and in this process only.
 */
bool qi_expect(chunk_t encr_i, chunk_t integ_i, chunk_t encr_r, chunk_t integ_r);

#endif /** QIPSEC_H_ */
