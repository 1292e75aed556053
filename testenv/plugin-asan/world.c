/*
 * plugin-asan: a charon without network and kernel.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "world.h"

#include <pthread.h>

#include <collections/linked_list.h>
#include <credentials/sets/mem_cred.h>
#include <sa/ikev2/tasks/ike_dpd.h>

#include "peer.h"

#define PLUGINS "random nonce openssl hmac kdf qipsec"
#define LOG_SIZE 65536

int world_patience = 2;
struct world_kernel world_kernel;
void (*world_tamper)(chunk_t packet, bool request);
struct world_notify world_notify;

static struct {
	kernel_feature_t features;
	uint32_t spi;
	linked_list_t *sent;
	mem_cred_t *creds;
	backend_t backend;
	listener_t listener;
	logger_t logger;
	/** what the backend gives to a responder */
	ike_cfg_t *ike_cfg;
	peer_cfg_t *peer_cfg;
	/** of the last IKE_SA rekey: [0] initiator's */
	ike_sa_id_t *rekeyed[2];
	pthread_mutex_t mutex;
	char log[LOG_SIZE];
} world = {
	.mutex = PTHREAD_MUTEX_INITIALIZER,
};

static kernel_feature_t get_features(kernel_ipsec_t *this)
{
	return world.features;
}

static status_t get_spi(kernel_ipsec_t *this, host_t *src, host_t *dst,
						uint8_t protocol, uint32_t *spi)
{
	*spi = htonl(++world.spi);
	return SUCCESS;
}

static bool filled(chunk_t key, uint8_t with)
{
	size_t i;

	for (i = 0; i < key.len && key.ptr[i] == with; i++)
	{
		/* next */
	}
	return i == key.len;
}

static status_t add_sa(kernel_ipsec_t *this, kernel_ipsec_sa_id_t *id,
					   kernel_ipsec_add_sa_t *data)
{
	world_kernel.added++;
	if (!filled(data->enc_key, PEER_ENCR) || !filled(data->int_key, PEER_INTEG))
	{
		world_kernel.other_keys++;
	}
	return SUCCESS;
}

static status_t query_sa(kernel_ipsec_t *this, kernel_ipsec_sa_id_t *id,
						 kernel_ipsec_query_sa_t *data, uint64_t *bytes,
						 uint64_t *packets, time_t *time)
{
	world_kernel.queried++;
	return NOT_SUPPORTED;
}

static status_t update_sa(kernel_ipsec_t *this, kernel_ipsec_sa_id_t *id,
						  kernel_ipsec_update_sa_t *data)
{
	world_kernel.updated++;
	return SUCCESS;
}

static status_t query_policy(kernel_ipsec_t *this, kernel_ipsec_policy_id_t *id,
							 kernel_ipsec_query_policy_t *data, time_t *use_time)
{
	*use_time = 1;
	return SUCCESS;
}

static kernel_ipsec_t *kernel_create(void)
{
	kernel_ipsec_t *this;

	INIT(this,
		.get_features = get_features,
		.get_spi = get_spi,
		.get_cpi = (void*)return_failed,
		.add_sa = add_sa,
		.update_sa = update_sa,
		.query_sa = query_sa,
		.del_sa = (void*)return_success,
		.flush_sas = (void*)return_success,
		.add_policy = (void*)return_success,
		.query_policy = query_policy,
		.del_policy = (void*)return_success,
		.flush_policies = (void*)return_success,
		.bypass_socket = (void*)return_true,
		.enable_udp_decap = (void*)return_true,
		.destroy = (void*)free,
	);
	return this;
}

static void send_packet(sender_t *this, packet_t *packet)
{
	message_t *message;
	chunk_t data = packet->get_data(packet);

	if (world_tamper && data.len > 28 && data.ptr[18] == IKE_SA_INIT)
	{
		world_tamper(data, !(data.ptr[19] & 0x20));
	}
	message = message_create_from_packet(packet);
	if (message->parse_header(message) == SUCCESS)
	{
		world.sent->insert_last(world.sent, message);
	}
	else
	{
		message->destroy(message);
	}
}

static void sender_destroy(sender_t *this)
{
	world.sent->destroy_offset(world.sent, offsetof(message_t, destroy));
	free(this);
}

static enumerator_t *ike_cfgs(backend_t *this, host_t *me, host_t *other)
{
	return enumerator_create_single(world.ike_cfg, NULL);
}

static enumerator_t *peer_cfgs(backend_t *this, identification_t *me,
							   identification_t *other)
{
	return enumerator_create_single(world.peer_cfg, NULL);
}

static bool message_hook(listener_t *this, ike_sa_t *ike_sa, message_t *message,
						 bool incoming, bool plain)
{
	if (plain && !incoming && world_notify.data &&
		message->get_exchange_type(message) == world_notify.exchange)
	{
		message->add_notify(message, FALSE, world_notify.type,
							chunk_create(world_notify.data, world_notify.len));
	}
	return TRUE;
}

static bool rekey_hook(listener_t *this, ike_sa_t *old, ike_sa_t *new)
{
	ike_sa_id_t *id = new->get_id(new);
	int i = id->is_initiator(id) ? 0 : 1;

	DESTROY_IF(world.rekeyed[i]);
	world.rekeyed[i] = id->clone(id);
	return TRUE;
}

static void log_line(logger_t *this, debug_t group, level_t level, int thread,
					 ike_sa_t *ike_sa, const char *message)
{
	size_t len;

	pthread_mutex_lock(&world.mutex);
	len = strlen(world.log);
	if (strpfx(message, "qipsec: ") && len + strlen(message) + 2 < LOG_SIZE)
	{
		sprintf(world.log + len, "%s\n", message);
	}
	pthread_mutex_unlock(&world.mutex);
	if (getenv("PLUGIN_ASAN_VERBOSE"))
	{
		fprintf(stderr, "%s\n", message);
	}
}

static level_t log_level(logger_t *this, debug_t group)
{
	return LEVEL_CTRL;
}

bool world_logged(const char *text)
{
	bool found;

	pthread_mutex_lock(&world.mutex);
	found = strstr(world.log, text) != NULL;
	pthread_mutex_unlock(&world.mutex);
	return found;
}

void world_log_reset(void)
{
	pthread_mutex_lock(&world.mutex);
	world.log[0] = '\0';
	pthread_mutex_unlock(&world.mutex);
}

bool world_start(char *socket, char *off, kernel_feature_t features)
{
	plugin_feature_t provided[] = {
		PLUGIN_CALLBACK(kernel_ipsec_register, kernel_create),
			PLUGIN_PROVIDE(CUSTOM, "kernel-ipsec"),
		PLUGIN_NOOP,
			PLUGIN_PROVIDE(CUSTOM, "kernel-net"),
			PLUGIN_PROVIDE(CUSTOM, "socket"),
	};
	sender_t *sender;

	world.features = features;
	if (!library_init("", "plugin-asan") || !libcharon_init())
	{
		return FALSE;
	}
	lib->settings->set_str(lib->settings, "%s.plugins.qipsec.socket", socket,
						   lib->ns);
	/* a machine busy with other tests is not late yet */
	lib->settings->set_int(lib->settings, "%s.plugins.qipsec.patience", world_patience,
						   lib->ns);
	/* a rekeyed CHILD_SA goes at once */
	lib->settings->set_int(lib->settings, "%s.delete_rekeyed_delay", 0, lib->ns);
	lib->settings->set_str(lib->settings, "%s.plugins.qipsec.off", off, lib->ns);
	world.logger = (logger_t){ .log = log_line, .get_level = log_level };
	charon->bus->add_logger(charon->bus, &world.logger);
	world.listener = (listener_t){ .message = message_hook, .ike_rekey = rekey_hook };
	charon->bus->add_listener(charon->bus, &world.listener);
	lib->plugins->add_static_features(lib->plugins, "world", provided,
									  countof(provided), TRUE, NULL, NULL);
	if (!charon->initialize(charon, PLUGINS))
	{
		return FALSE;
	}
	world.sent = linked_list_create();
	INIT(sender,
		.send = send_packet,
		.send_no_marker = (void*)nop,
		.flush = (void*)nop,
		.destroy = sender_destroy,
	);
	charon->sender->destroy(charon->sender);
	charon->sender = sender;
	world.backend = (backend_t){
		.create_ike_cfg_enumerator = ike_cfgs,
		.create_peer_cfg_enumerator = peer_cfgs,
		.get_peer_cfg_by_name = (void*)return_null,
	};
	charon->backends->add_backend(charon->backends, &world.backend);
	world.creds = mem_cred_create();
	world.creds->add_shared(world.creds, shared_key_create(SHARED_IKE,
							chunk_clone(chunk_from_str("test"))),
							identification_create_from_string("%any"), NULL);
	lib->credmgr->add_set(lib->credmgr, &world.creds->set);
	return TRUE;
}

void world_stop(void)
{
	charon->ike_sa_manager->flush(charon->ike_sa_manager);
	charon->backends->remove_backend(charon->backends, &world.backend);
	lib->credmgr->remove_set(lib->credmgr, &world.creds->set);
	world.creds->destroy(world.creds);
	DESTROY_IF(world.peer_cfg);
	DESTROY_IF(world.ike_cfg);
	DESTROY_IF(world.rekeyed[0]);
	DESTROY_IF(world.rekeyed[1]);
	charon->bus->remove_listener(charon->bus, &world.listener);
	libcharon_deinit();
	library_deinit();
}

static ike_cfg_t *make_ike_cfg(void)
{
	ike_cfg_create_t create = {
		.version = IKEV2,
		.local = "127.0.0.1",
		.local_port = IKEV2_UDP_PORT,
		.remote = "127.0.0.1",
		.remote_port = IKEV2_UDP_PORT,
	};
	ike_cfg_t *cfg = ike_cfg_create(&create);

	cfg->add_proposal(cfg, proposal_create_from_string(PROTO_IKE,
							"aes256-sha256-ecp256"));
	return cfg;
}

static void add_auth(peer_cfg_t *cfg, bool local, char *id)
{
	auth_cfg_t *auth = auth_cfg_create();

	auth->add(auth, AUTH_RULE_AUTH_CLASS, AUTH_CLASS_PSK);
	auth->add(auth, AUTH_RULE_IDENTITY, identification_create_from_string(id));
	cfg->add_auth_cfg(cfg, auth, local);
}

static peer_cfg_t *make_peer_cfg(const char *name, bool initiator,
								 child_cfg_t **child)
{
	peer_cfg_create_t create = {
		.cert_policy = CERT_SEND_IF_ASKED,
		.unique = UNIQUE_NEVER,
		.keyingtries = 1,
	};
	child_cfg_create_t child_create = {
		.mode = MODE_TUNNEL,
	};
	peer_cfg_t *cfg = peer_cfg_create((char*)name, make_ike_cfg(), &create);

	add_auth(cfg, TRUE, initiator ? "init" : "resp");
	add_auth(cfg, FALSE, initiator ? "resp" : "init");
	*child = child_cfg_create("child", &child_create);
	/* with an integrity key, so that all four chunks of a CHILD_SA are there */
	(*child)->add_proposal(*child, proposal_create_from_string(PROTO_ESP,
						   "aes256-sha256"));
	(*child)->add_traffic_selector(*child, TRUE,
						   traffic_selector_create_dynamic(0, 0, 65535));
	(*child)->add_traffic_selector(*child, FALSE,
						   traffic_selector_create_dynamic(0, 0, 65535));
	cfg->add_child_cfg(cfg, (*child)->get_ref(*child));
	return cfg;
}

bool world_pair(world_pair_t *pair, const char *name)
{
	peer_cfg_t *peer_cfg;
	child_cfg_t *child;
	bool good;

	pair->managed = FALSE;
	pair->init = charon->ike_sa_manager->create_new(charon->ike_sa_manager,
													IKEV2, TRUE);
	pair->resp = charon->ike_sa_manager->create_new(charon->ike_sa_manager,
													IKEV2, FALSE);
	DESTROY_IF(world.peer_cfg);
	DESTROY_IF(world.ike_cfg);
	world.ike_cfg = make_ike_cfg();
	world.peer_cfg = make_peer_cfg(name, FALSE, &child);
	child->destroy(child);
	good = pair->init && pair->resp;
	peer_cfg = make_peer_cfg(name, TRUE, &pair->child);
	if (good)
	{
		pair->init->set_peer_cfg(pair->init, peer_cfg);
	}
	peer_cfg->destroy(peer_cfg);
	return good;
}

static void destroy_sa(world_pair_t *pair, ike_sa_t **sa)
{
	if (*sa && pair->managed)
	{
		charon->ike_sa_manager->checkin_and_destroy(charon->ike_sa_manager, *sa);
	}
	else if (*sa)
	{
		charon->bus->set_sa(charon->bus, *sa);
		(*sa)->destroy(*sa);
		charon->bus->set_sa(charon->bus, NULL);
	}
	*sa = NULL;
}

status_t world_initiate(world_pair_t *pair)
{
	child_init_args_t args = {
#ifdef CPU_ID_MAX
		.cpu = CPU_ID_MAX,
#endif
	};
	status_t status;

	charon->bus->set_sa(charon->bus, pair->init);
	status = pair->init->initiate(pair->init, pair->child, &args);
	pair->child = NULL;
	charon->bus->set_sa(charon->bus, NULL);
	if (status == DESTROY_ME || status == FAILED)
	{
		destroy_sa(pair, &pair->init);
	}
	else
	{
		world_deliver(pair);
	}
	return status;
}

void world_ping(world_pair_t *pair)
{
	charon->bus->set_sa(charon->bus, pair->init);
	pair->init->queue_task(pair->init, (task_t*)ike_dpd_create(TRUE));
	pair->init->initiate(pair->init, NULL, NULL);
	charon->bus->set_sa(charon->bus, NULL);
}

/** As the manager does it: SPIs of IKE_SA_INIT are taken before the hooks run. */
static void set_spis(ike_sa_t *to, message_t *message)
{
	ike_sa_id_t *id = message->get_ike_sa_id(message), *mine = to->get_id(to);

	if (message->get_exchange_type(message) == IKE_SA_INIT)
	{
		if (message->get_request(message))
		{
			mine->set_initiator_spi(mine, id->get_initiator_spi(id));
		}
		else
		{
			mine->set_responder_spi(mine, id->get_responder_spi(id));
		}
	}
}

u_int world_deliver(world_pair_t *pair)
{
	message_t *message;
	ike_sa_id_t *id;
	ike_sa_t **to;
	u_int n = 0;

	/* more than 40 is a loop */
	while (n < 40 && world.sent->remove_first(world.sent,
											  (void**)&message) == SUCCESS)
	{
		n++;
		id = message->get_ike_sa_id(message);
		to = id->is_initiator(id) ? &pair->resp : &pair->init;
		if (*to)
		{
			set_spis(*to, message);
			charon->bus->set_sa(charon->bus, *to);
			if ((*to)->process_message(*to, message) == DESTROY_ME)
			{
				destroy_sa(pair, to);
			}
			charon->bus->set_sa(charon->bus, NULL);
		}
		message->destroy(message);
	}
	return n;
}

void world_end(world_pair_t *pair)
{
	message_t *message;

	destroy_sa(pair, &pair->init);
	destroy_sa(pair, &pair->resp);
	DESTROY_IF(pair->child);
	pair->child = NULL;
	while (world.sent->remove_first(world.sent, (void**)&message) == SUCCESS)
	{
		message->destroy(message);
	}
}

bool world_take_rekeyed(world_pair_t *pair)
{
	ike_sa_t **sas[] = { &pair->init, &pair->resp };
	int i;

	world_end(pair);
	pair->managed = TRUE;
	for (i = 0; i < 2; i++)
	{
		if (!world.rekeyed[i])
		{
			return FALSE;
		}
		*sas[i] = charon->ike_sa_manager->checkout(charon->ike_sa_manager,
												   world.rekeyed[i]);
		charon->bus->set_sa(charon->bus, NULL);
		if (!*sas[i])
		{
			return FALSE;
		}
	}
	return TRUE;
}

u_int world_children(ike_sa_t *ike_sa)
{
	return ike_sa ? ike_sa->get_child_count(ike_sa) : 0;
}

uint32_t world_spi(ike_sa_t *ike_sa)
{
	enumerator_t *enumerator;
	child_sa_t *child;
	uint32_t spi = 0;

	if (ike_sa)
	{
		enumerator = ike_sa->create_child_sa_enumerator(ike_sa);
		if (enumerator->enumerate(enumerator, &child))
		{
			spi = child->get_spi(child, TRUE);
		}
		enumerator->destroy(enumerator);
	}
	return spi;
}
