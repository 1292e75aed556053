/*
 * qipsec: add_sa, query_sa and update_sa of charon's kernel interface.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

#include <collections/linked_list.h>
#include <threading/mutex.h>

/** Largest token of one SA (encryption and integrity key), in bytes. */
#define MAX_TOKEN 256
/** After this a token that no add_sa has shown is forgotten, in s. qipsecd honours
 *  it for less: both add_sa follow derive_child_keys in the same thread. */
#define TOKEN_TTL 10
/** CHILD_SAs between derive_child_keys and add_sa: fewer than threads. */
#define MAX_EXPECTED 256

/** The tokens of one CHILD_SA, [0] from the exchange initiator, [1] to it. */
typedef struct {
	uint8_t token[2][MAX_TOKEN];
	size_t len[2];
	bool taken[2];
	/** an add_sa failed: the other one is refused without asking */
	bool failed;
	time_t born;
} expected_t;

static struct {
	kernel_interface_t stock;
	bool hooked;
	mutex_t *mutex;
	/** expected_t */
	linked_list_t *expected;
} this_kernel;

static void expected_destroy(expected_t *this)
{
	memwipe(this, sizeof(*this));
	free(this);
}

/** Removes what is done or too old. Call with the mutex. */
static void purge(void)
{
	enumerator_t *enumerator;
	expected_t *entry;
	time_t t = time_monotonic(NULL);

	enumerator = this_kernel.expected->create_enumerator(this_kernel.expected);
	while (enumerator->enumerate(enumerator, &entry))
	{
		if ((entry->taken[0] && entry->taken[1]) || t - entry->born > TOKEN_TTL)
		{
			this_kernel.expected->remove_at(this_kernel.expected, enumerator);
			expected_destroy(entry);
		}
	}
	enumerator->destroy(enumerator);
}

static bool join(expected_t *entry, int dir, chunk_t encr, chunk_t integ)
{
	if (encr.len + integ.len == 0 || encr.len > MAX_TOKEN ||
		integ.len > MAX_TOKEN - encr.len)
	{
		return FALSE;
	}
	memcpy(entry->token[dir], encr.ptr, encr.len);
	if (integ.len)
	{
		memcpy(entry->token[dir] + encr.len, integ.ptr, integ.len);
	}
	entry->len[dir] = encr.len + integ.len;
	return TRUE;
}

bool qi_expect(chunk_t encr_i, chunk_t integ_i, chunk_t encr_r, chunk_t integ_r)
{
	expected_t *entry;
	bool good;

	INIT(entry,
		.born = time_monotonic(NULL),
	);
	good = join(entry, 0, encr_i, integ_i) && join(entry, 1, encr_r, integ_r);
	if (good)
	{
		this_kernel.mutex->lock(this_kernel.mutex);
		purge();
		good = this_kernel.expected->get_count(this_kernel.expected) < MAX_EXPECTED;
		if (good)
		{
			this_kernel.expected->insert_last(this_kernel.expected, entry);
		}
		this_kernel.mutex->unlock(this_kernel.mutex);
	}
	if (!good)
	{
		expected_destroy(entry);
	}
	return good;
}

/** Finds the token of an add_sa and its direction. Call with the mutex. */
static expected_t *find(kernel_ipsec_add_sa_t *data, int *dir)
{
	enumerator_t *enumerator;
	expected_t *entry, *found = NULL;
	int i;

	enumerator = this_kernel.expected->create_enumerator(this_kernel.expected);
	while (!found && enumerator->enumerate(enumerator, &entry))
	{
		for (i = 0; i < 2 && !found; i++)
		{
			if (entry->len[i] == data->enc_key.len + data->int_key.len &&
				memeq_const(entry->token[i], data->enc_key.ptr,
							data->enc_key.len) &&
				memeq_const(entry->token[i] + data->enc_key.len,
							data->int_key.ptr, data->int_key.len))
			{
				found = entry;
				*dir = i;
			}
		}
	}
	enumerator->destroy(enumerator);
	return found;
}

/** Takes the token of an add_sa, once; gives the cause if it may not. */
static const char *take(kernel_ipsec_add_sa_t *data)
{
	const char *why = NULL;
	expected_t *entry;
	int dir;

	this_kernel.mutex->lock(this_kernel.mutex);
	purge();
	entry = find(data, &dir);
	if (!entry)
	{
		why = "its keys are not a token of this plugin";
	}
	else if (entry->failed)
	{
		why = "the other SA of its CHILD_SA failed";
	}
	else if (entry->taken[dir])
	{
		why = "its token was used before";
	}
	else if (dir != (data->initiator == data->inbound ? 1 : 0))
	{
		why = "its token is that of the other direction";
	}
	if (entry)
	{
		entry->taken[dir] = TRUE;
	}
	this_kernel.mutex->unlock(this_kernel.mutex);
	return why;
}

/** Says that an add_sa failed, so that the second one does not ask. */
static void spoil(kernel_ipsec_add_sa_t *data)
{
	expected_t *entry;
	int dir;

	this_kernel.mutex->lock(this_kernel.mutex);
	entry = find(data, &dir);
	if (entry)
	{
		entry->failed = TRUE;
	}
	this_kernel.mutex->unlock(this_kernel.mutex);
}

static void put_host(qi_call_t *call, uint16_t tag, host_t *host)
{
	chunk_t addr = host->get_address(host);
	uint8_t value[18];

	if (addr.len > sizeof(value) - 2)
	{
		addr.len = 0;
	}
	memcpy(value, addr.ptr, addr.len);
	htoun16(value + addr.len, host->get_port(host));
	qi_put(call, tag, value, addr.len + 2);
}

static void put_mark(qi_call_t *call, uint16_t tag, mark_t mark)
{
	uint8_t value[8];

	htoun32(value, mark.value);
	htoun32(value + 4, mark.mask);
	qi_put(call, tag, value, sizeof(value));
}

static void put_id(qi_call_t *call, kernel_ipsec_sa_id_t *id)
{
	put_host(call, QI_T_SRC, id->src);
	put_host(call, QI_T_DST, id->dst);
	qi_put(call, QI_T_SPI, &id->spi, sizeof(id->spi));
	qi_put_u8(call, QI_T_PROTOCOL, id->proto);
	put_mark(call, QI_T_MARK, id->mark);
	qi_put_u32(call, QI_T_IF_ID, id->if_id);
}

static void put_ts(qi_call_t *call, uint16_t tag, linked_list_t *list)
{
	enumerator_t *enumerator;
	traffic_selector_t *ts;
	chunk_t from, to;
	uint8_t value[5 + 2 * 16];

	enumerator = list->create_enumerator(list);
	while (enumerator->enumerate(enumerator, &ts))
	{
		from = ts->get_from_address(ts);
		to = ts->get_to_address(ts);
		if (from.len != to.len || from.len > 16)
		{
			call->frame.overflow = TRUE;
			break;
		}
		value[0] = ts->get_protocol(ts);
		htoun16(value + 1, ts->get_from_port(ts));
		htoun16(value + 3, ts->get_to_port(ts));
		memcpy(value + 5, from.ptr, from.len);
		memcpy(value + 5 + from.len, to.ptr, to.len);
		qi_put(call, tag, value, 5 + from.len + to.len);
	}
	enumerator->destroy(enumerator);
}

static void put_lifetime(qi_call_t *call, lifetime_cfg_t *lifetime)
{
	uint8_t value[48] = { 0 };

	if (lifetime)
	{
		htoun64(value, lifetime->time.life);
		htoun64(value + 8, lifetime->time.rekey);
		htoun64(value + 16, lifetime->bytes.life);
		htoun64(value + 24, lifetime->bytes.rekey);
		htoun64(value + 32, lifetime->packets.life);
		htoun64(value + 40, lifetime->packets.rekey);
	}
	qi_put(call, QI_T_LIFETIME, value, sizeof(value));
}

static void put_sa(qi_call_t *call, kernel_ipsec_add_sa_t *data)
{
	uint8_t token[MAX_TOKEN];

	qi_put_u32(call, QI_T_REQID, data->reqid);
	qi_put_u8(call, QI_T_MODE, data->mode);
	put_ts(call, QI_T_SRC_TS, data->src_ts);
	put_ts(call, QI_T_DST_TS, data->dst_ts);
	put_lifetime(call, data->lifetime);
	qi_put_u16(call, QI_T_ENCR_ALG, data->enc_alg);
	/* charon's word for "none", of an AEAD, is 1024, not IANA's 0 */
	qi_put_u16(call, QI_T_INTEG_ALG,
			   data->int_alg == AUTH_UNDEFINED ? 0 : data->int_alg);
	/* take() has found it, so it fits */
	memcpy(token, data->enc_key.ptr, data->enc_key.len);
	if (data->int_key.len)
	{
		memcpy(token + data->enc_key.len, data->int_key.ptr, data->int_key.len);
	}
	qi_put(call, QI_T_TOKEN, token, data->enc_key.len + data->int_key.len);
	memwipe(token, sizeof(token));
	qi_put_u16(call, QI_T_ENCR_LEN, data->enc_key.len);
	qi_put_u32(call, QI_T_WINDOW, data->replay_window);
	qi_put_u32(call, QI_T_TFC, data->tfc);
	qi_put_u16(call, QI_T_IPCOMP, data->ipcomp);
	qi_put_u8(call, QI_T_ENCAP, !!data->encap);
	qi_put_u8(call, QI_T_OFFLOAD, data->hw_offload);
	put_mark(call, QI_T_SET_MARK, data->mark);
	qi_put_u8(call, QI_T_LABEL, data->label != NULL);
	qi_put_u8(call, QI_T_ESN, !!data->esn);
	qi_put_u8(call, QI_T_COPY_DF, !!data->copy_df);
	qi_put_u8(call, QI_T_COPY_ECN, !!data->copy_ecn);
	qi_put_u8(call, QI_T_COPY_DSCP, data->copy_dscp);
	qi_put_u8(call, QI_T_INITIATOR, !!data->initiator);
	qi_put_u8(call, QI_T_INBOUND, !!data->inbound);
	qi_put_u8(call, QI_T_UPDATE, !!data->update);
}

/** USE_KEY: the stock function installs the final key. */
static bool install(kernel_interface_t *this, kernel_ipsec_sa_id_t *id,
					kernel_ipsec_add_sa_t *data, qi_call_t *call)
{
	kernel_ipsec_add_sa_t final = *data;

	final.enc_key = final.int_key = chunk_empty;
	if ((data->enc_key.len && !qi_get(call, QI_T_ENCR_KEY, data->enc_key.len,
									  data->enc_key.len, &final.enc_key)) ||
		(data->int_key.len && !qi_get(call, QI_T_INTEG_KEY, data->int_key.len,
									  data->int_key.len, &final.int_key)))
	{
		strcpy(call->why, "qipsecd's keys have other lengths than the token");
		return FALSE;
	}
	if (this_kernel.stock.add_sa(this, id, &final) != SUCCESS)
	{
		strcpy(call->why, "the kernel refused the SA");
		return FALSE;
	}
	return TRUE;
}

static bool ask_add(kernel_interface_t *this, ike_sa_t *ike_sa,
					kernel_ipsec_sa_id_t *id, kernel_ipsec_add_sa_t *data,
					qi_call_t *call)
{
	char *name = ike_sa->get_name(ike_sa);

	qi_put_u32(call, QI_T_UID, ike_sa->get_unique_id(ike_sa));
	qi_put(call, QI_T_CONNECTION, name, strlen(name));
	put_id(call, id);
	put_sa(call, data);
	if (!qi_call_run(call))
	{
		return FALSE;
	}
	switch (call->kind)
	{
		case QI_INSTALLED:
			if (!qi_call_next(call, QI_ACK))
			{
				return FALSE;
			}
			if (call->kind == QI_COMMITTED)
			{
				return TRUE;
			}
			break;
		case QI_USE_KEY:
			return install(this, id, data, call);
		default:
			break;
	}
	snprintf(call->why, sizeof(call->why), "answer %u does not belong to ADD",
			 call->kind);
	return FALSE;
}

static status_t add_sa(kernel_interface_t *this, kernel_ipsec_sa_id_t *id,
					   kernel_ipsec_add_sa_t *data)
{
	ike_sa_t *ike_sa = charon->bus->get_sa(charon->bus);
	qi_call_t call;
	const char *why;
	bool good;

	if (!ike_sa)
	{
		DBG1(DBG_KNL, "qipsec: SA %.8x refused: no IKE_SA asks for it",
			 ntohl(id->spi));
		return FAILED;
	}
	if (qi_off(ike_sa))
	{
		return this_kernel.stock.add_sa(this, id, data);
	}
	why = take(data) ?: qi_not_carried(data);
	if (why)
	{
		DBG1(DBG_KNL, "qipsec: connection '%s': SA %.8x refused: %s",
			 ike_sa->get_name(ike_sa), ntohl(id->spi), why);
		return FAILED;
	}
	qi_call_init(&call, QI_ADD_SA);
	good = ask_add(this, ike_sa, id, data, &call);
	if (good)
	{
		DBG1(DBG_KNL, "qipsec: connection '%s': SA %.8x installed by %s",
			 ike_sa->get_name(ike_sa), ntohl(id->spi),
			 call.kind == QI_COMMITTED ? "qipsecd" : "charon with qipsecd's key");
	}
	else
	{
		spoil(data);
		DBG1(DBG_KNL, "qipsec: connection '%s': SA %.8x refused: %s",
			 ike_sa->get_name(ike_sa), ntohl(id->spi), call.why);
	}
	qi_call_done(&call);
	return good ? SUCCESS : FAILED;
}

static char *name_of(ike_sa_t *ike_sa)
{
	return ike_sa ? ike_sa->get_name(ike_sa) : "?";
}

static status_t query_sa(kernel_interface_t *this, kernel_ipsec_sa_id_t *id,
						 kernel_ipsec_query_sa_t *data, uint64_t *bytes,
						 uint64_t *packets, time_t *time)
{
	ike_sa_t *ike_sa = charon->bus->get_sa(charon->bus);
	uint64_t n[3] = { 0 };
	qi_call_t call;
	bool good;

	if (ike_sa && qi_off(ike_sa))
	{
		return this_kernel.stock.query_sa(this, id, data, bytes, packets, time);
	}
	qi_call_init(&call, QI_QUERY);
	put_id(&call, id);
	good = qi_call_ok(&call);
	if (good && (!qi_get_u64(&call, QI_T_BYTES, &n[0]) ||
				 !qi_get_u64(&call, QI_T_PACKETS, &n[1]) ||
				 !qi_get_u64(&call, QI_T_LAST_USE, &n[2])))
	{
		strcpy(call.why, "qipsecd's answer to QUERY is incomplete");
		good = FALSE;
	}
	if (good)
	{
		if (bytes)
		{
			*bytes = n[0];
		}
		if (packets)
		{
			*packets = n[1];
		}
		if (time)
		{
			*time = n[2] / 1000000000;
		}
	}
	else
	{
		DBG1(DBG_KNL, "qipsec: connection '%s': SA %.8x not queried: %s",
			 name_of(ike_sa), ntohl(id->spi), call.why);
	}
	qi_call_done(&call);
	return good ? SUCCESS : FAILED;
}

/** NOT_SUPPORTED makes charon set up the CHILD_SA anew, with a new key. */
static status_t update_sa(kernel_interface_t *this, kernel_ipsec_sa_id_t *id,
						  kernel_ipsec_update_sa_t *data)
{
	ike_sa_t *ike_sa = charon->bus->get_sa(charon->bus);
	qi_call_t call;
	bool good;

	if (ike_sa && qi_off(ike_sa))
	{
		return this_kernel.stock.update_sa(this, id, data);
	}
	if (data->new_reqid)
	{
		return NOT_SUPPORTED;
	}
	qi_call_init(&call, QI_UPDATE);
	put_id(&call, id);
	put_host(&call, QI_T_NEW_SRC, data->new_src);
	put_host(&call, QI_T_NEW_DST, data->new_dst);
	qi_put_u8(&call, QI_T_ENCAP, !!data->encap);
	qi_put_u8(&call, QI_T_NEW_ENCAP, !!data->new_encap);
	good = qi_call_ok(&call);
	if (!good)
	{
		DBG1(DBG_KNL, "qipsec: connection '%s': SA %.8x not moved: %s",
			 name_of(ike_sa), ntohl(id->spi), call.why);
	}
	qi_call_done(&call);
	return good ? SUCCESS : NOT_SUPPORTED;
}

void qi_kernel_start(void)
{
	kernel_interface_t *kernel = charon->kernel;

	this_kernel.mutex = mutex_create(MUTEX_TYPE_DEFAULT);
	this_kernel.expected = linked_list_create();
	this_kernel.stock = *kernel;
#ifdef QI_TEST_NO_ADD_SA /* a build for the test that the token is no usable key */
	(void)add_sa;
#else
	kernel->add_sa = add_sa;
#endif
	kernel->query_sa = query_sa;
	kernel->update_sa = update_sa;
	this_kernel.hooked = TRUE;
}

void qi_kernel_stop(void)
{
	if (this_kernel.hooked)
	{
		charon->kernel->add_sa = this_kernel.stock.add_sa;
		charon->kernel->query_sa = this_kernel.stock.query_sa;
		charon->kernel->update_sa = this_kernel.stock.update_sa;
		this_kernel.hooked = FALSE;
		this_kernel.expected->destroy_function(this_kernel.expected,
											   (void*)expected_destroy);
		this_kernel.mutex->destroy(this_kernel.mutex);
	}
}
