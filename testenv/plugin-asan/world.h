/*
 * plugin-asan: a charon without network and kernel.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef WORLD_H_
#define WORLD_H_

#include <daemon.h>

/** What the scripted kernel saw. */
extern struct world_kernel {
	/** calls of its own add_sa, by charon or by the plugin with USE_KEY */
	u_int added;
	/** those whose keys were not those of the peer's USE_KEY */
	u_int other_keys;
	u_int queried, updated;
} world_kernel;

/** Two IKE_SAs of the same charon that talk to each other. */
typedef struct {
	ike_sa_t *init, *resp;
	child_cfg_t *child;
	/** the manager has them checked out */
	bool managed;
} world_pair_t;

/** May change a packet of IKE_SA_INIT before it is delivered; NULL: none. */
extern void (*world_tamper)(chunk_t packet, bool request);

/** A notify that a listener before the plugin's puts into each message of an
 *  exchange. */
extern struct world_notify {
	exchange_type_t exchange;
	uint16_t type;
	/** none if NULL */
	uint8_t *data;
	size_t len;
} world_notify;

/** Setting patience for world_start(); above 1 because sanitisers are slow. */
extern int world_patience;

/** Starts charon with the plugin: socket, setting off, features of the kernel. */
bool world_start(char *socket, char *off, kernel_feature_t features);

/** Ends it; with it go both libraries. */
void world_stop(void);

/** Makes the IKE_SAs of a connection of this name. */
bool world_pair(world_pair_t *pair, const char *name);

/** Initiates and delivers all there is. */
status_t world_initiate(world_pair_t *pair);

/** The first IKE_SA asks the second one for a sign of life. Delivers nothing. */
void world_ping(world_pair_t *pair);

/** Delivers all that was sent between them; gives the number of messages. */
u_int world_deliver(world_pair_t *pair);

/** Destroys them; an IKE_SA rekey leaves its new ones to charon. */
void world_end(world_pair_t *pair);

/** Makes pair that of the last IKE_SA rekey; FALSE: there was none. */
bool world_take_rekeyed(world_pair_t *pair);

/** CHILD_SAs of an IKE_SA that may be gone, and the inbound SPI of the first. */
u_int world_children(ike_sa_t *ike_sa);
uint32_t world_spi(ike_sa_t *ike_sa);

/** The plugin's lines in charon's log since world_log_reset() contain text. */
bool world_logged(const char *text);
void world_log_reset(void);

#endif /** WORLD_H_ */
