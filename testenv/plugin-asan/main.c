/*
 * plugin-asan: the charon plugin under AddressSanitizer and UBSan.
 *
 * usage: plugin-asan MODE SOCKET     prints "ok - ..." or "not ok - ..." lines
 *
 * The plugin's objects are linked into this program with the installed libcharon
 * and libstrongswan, whose plugin loader finds them here. So the hooks are run by
 * charon's own IKE_SAs, messages and keymats: two IKE_SAs of one charon hand each
 * other their packets, without network, kernel and threads, and a scripted peer is
 * qipsecd. That reaches every line of the plugin in every order of failures within
 * seconds, which the real charon-systemd, with two gateways and a kernel with ESP,
 * would not; those runs are testenv's, with the plugin as it is installed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../../ike/charon/qipsec.h"
#include "peer.h"
#include "world.h"

static struct {
	char *socket;
	u_int cases;
	/** of the group that runs */
	u_int failed;
	bool any_failed;
} this_run;

/** Counts a check; says what is wrong. */
static bool check(bool good, const char *fmt, ...)
{
	va_list args;

	this_run.cases++;
	if (!good)
	{
		this_run.failed++;
		this_run.any_failed = TRUE;
		printf("not ok - plugin-asan: ");
		va_start(args, fmt);
		vprintf(fmt, args);
		va_end(args);
		printf("\n");
	}
	return good;
}

/** Ends a group of checks. */
static void group(const char *name)
{
	if (!this_run.failed)
	{
		printf("ok - plugin-asan: %s (%u checks)\n", name, this_run.cases);
	}
	fflush(stdout);
	this_run.cases = this_run.failed = 0;
}

static void reset(void)
{
	peer_reset();
	world_log_reset();
	memset(&world_kernel, 0, sizeof(world_kernel));
}

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static u_int count_files(void)
{
	DIR *dir = opendir("/proc/self/fd");
	u_int n = 0;

	while (dir && readdir(dir))
	{
		n++;
	}
	closedir(dir);
	return n;
}

/** TRUE if there are so many; the peer's end may close a little later. */
static bool files_are(u_int n)
{
	u_int i;

	for (i = 0; i < 100 && count_files() != n; i++)
	{
		usleep(10000);
	}
	return count_files() == n;
}

/** Starts the peer; TRUE once the plugin has its standing connection again, so that
 *  nothing of it is logged later. */
static bool peer_back(void)
{
	u_int i;

	reset();
	if (!peer_start(this_run.socket) || !peer_wait(QI_HELLO, 1))
	{
		return FALSE;
	}
	for (i = 0; i < 500 && !world_logged("qipsecd is there"); i++)
	{
		usleep(10000);
	}
	return world_logged("qipsecd is there");
}

/** A step of setting up a CHILD_SA, and what is seen if that step fails. */
typedef struct {
	const char *name;
	uint8_t kind;
	u_int nth;
	/** the answer has TLVs without which the plugin must not go on */
	bool needs_tlv;
	bool use_key;
	/** requests counted when it fails */
	u_int sent, bind, add;
	/** what it cannot prevent: the responder has its CHILD_SA already */
	u_int at_resp;
} step_t;

static const step_t steps[] = {
	{ "GETKEY", QI_GETKEY, 1, TRUE, FALSE, 0, 0, 0, 0 },
	{ "SENT", QI_SENT, 1, TRUE, FALSE, 1, 1, 2, 0 },
	{ "BIND of the responder", QI_BIND, 1, FALSE, FALSE, 1, 1, 0, 0 },
	{ "BIND of the initiator", QI_BIND, 2, FALSE, FALSE, 1, 2, 2, 0 },
	{ "1st ADD of the responder", QI_ADD_SA, 1, FALSE, FALSE, 1, 1, 1, 0 },
	{ "2nd ADD of the responder", QI_ADD_SA, 2, FALSE, FALSE, 1, 1, 2, 0 },
	{ "1st ADD of the initiator", QI_ADD_SA, 3, FALSE, FALSE, 1, 2, 3, 0 },
	{ "2nd ADD of the initiator", QI_ADD_SA, 4, FALSE, FALSE, 1, 2, 4, 0 },
	{ "1st ACK of the responder", QI_ACK, 1, FALSE, FALSE, 1, 1, 1, 0 },
	{ "2nd ACK of the initiator", QI_ACK, 4, FALSE, FALSE, 1, 2, 4, 0 },
	{ "1st USE_KEY", QI_ADD_SA, 1, TRUE, TRUE, 1, 1, 1, 0 },
	{ "4th USE_KEY", QI_ADD_SA, 4, TRUE, TRUE, 1, 2, 4, 0 },
};

/** TRUE if an answer spoilt like that is as good as a good one. */
static bool harmless(const step_t *step, act_t act)
{
	if (act == ACT_DOUBLE)
	{	/* the second one stands where COMMITTED is expected */
		return step->kind != QI_ADD_SA || step->use_key;
	}
	return act <= ACT_FULL || (act >= ACT_BARE && !step->needs_tlv);
}

static void one_step(const step_t *step, act_t act)
{
	world_pair_t pair;
	const char *name = act_names[act];
	bool good = harmless(step, act);
	u_int files = count_files();

	reset();
	peer_setup.use_key = step->use_key;
	peer_script(step->kind, step->nth, act);
	if (!check(world_pair(&pair, "link"), "%s %s: no IKE_SAs", step->name, name))
	{
		return;
	}
	world_initiate(&pair);
	check(world_children(pair.init) == good && world_children(pair.resp) == good,
		  "%s %s: %u CHILD_SAs at the initiator, %u at the responder, not %u",
		  step->name, name, world_children(pair.init), world_children(pair.resp),
		  good);
	check(peer_count(QI_GETKEY) == 1 &&
		  peer_count(QI_SENT) == (good ? 1 : step->sent) &&
		  peer_count(QI_BIND) == (good ? 2 : step->bind) &&
		  peer_count(QI_ADD_SA) == (good ? 4 : step->add),
		  "%s %s: %u GETKEY, %u SENT, %u BIND, %u ADD", step->name, name,
		  peer_count(QI_GETKEY), peer_count(QI_SENT), peer_count(QI_BIND),
		  peer_count(QI_ADD_SA));
	check(good || world_logged("connection 'link': "),
		  "%s %s: no cause in the log", step->name, name);
	check(act != ACT_REFUSE || world_logged(PEER_REFUSAL),
		  "%s %s: the refusal is not in the log", step->name, name);
	check(!world_kernel.other_keys && (step->use_key || !world_kernel.added),
		  "%s %s: charon added %u SAs, %u with keys that are not qipsecd's",
		  step->name, name, world_kernel.added, world_kernel.other_keys);
	check(!peer_complaint(), "%s %s: %s", step->name, name, peer_complaint());
	world_end(&pair);
	check(peer_wait(QI_END, 1), "%s %s: no END", step->name, name);
	check(files_are(files), "%s %s: open files", step->name, name);
}

static void all_steps(void)
{
	u_int i;
	act_t act;

	for (i = 0; i < countof(steps); i++)
	{
		for (act = ACT_GOOD; act < ACT_ALL; act++)
		{
			one_step(&steps[i], act);
		}
		group(steps[i].name);
	}
}

static void rekey(ike_sa_t *ike_sa)
{
	charon->bus->set_sa(charon->bus, ike_sa);
	ike_sa->rekey_child_sa(ike_sa, PROTO_ESP, world_spi(ike_sa));
	charon->bus->set_sa(charon->bus, NULL);
}

/** Rekeys the CHILD_SA of one side under an answer spoilt like that. */
static void one_rekey(world_pair_t *pair, bool by_init, const step_t *step, act_t act)
{
	uint32_t old = world_spi(pair->init);
	bool good = harmless(step, act);

	reset();
	peer_setup.use_key = step->use_key;
	peer_script(step->kind, step->nth, act);
	rekey(by_init ? pair->init : pair->resp);
	world_deliver(pair);
	check(pair->init && pair->resp, "rekey, %s %s: the IKE_SA is gone", step->name,
		  act_names[act]);
	check(!good || (world_children(pair->init) == 1 && world_spi(pair->init) != old),
		  "rekey, %s %s: not rekeyed", step->name, act_names[act]);
	check(good || world_spi(pair->init) == old,
		  "rekey, %s %s: the old CHILD_SA is gone", step->name, act_names[act]);
	check(peer_count(QI_GETKEY) == 1 && !world_kernel.added && !peer_complaint(),
		  "rekey, %s %s: %u GETKEY, %u SAs added, %s", step->name, act_names[act],
		  peer_count(QI_GETKEY), world_kernel.added, peer_complaint() ?: "");
}

static void rekeys(void)
{
	static const act_t acts[] = { ACT_GOOD, ACT_REFUSE, ACT_CLOSE };
	world_pair_t pair;
	u_int i, j;

	for (i = 0; i < countof(steps); i++)
	{
		for (j = 0; !steps[i].use_key && j < 2 * countof(acts); j++)
		{
			reset();
			check(world_pair(&pair, "link"), "no IKE_SAs");
			world_initiate(&pair);
			one_rekey(&pair, j % 2, &steps[i], acts[j / 2]);
			world_end(&pair);
		}
	}
	group("rekeys of a CHILD_SA by either side");

	reset();
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	charon->bus->set_sa(charon->bus, pair.init);
	pair.init->rekey(pair.init);
	charon->bus->set_sa(charon->bus, NULL);
	world_deliver(&pair);
	if (check(world_take_rekeyed(&pair), "the IKE_SA was not rekeyed"))
	{
		check(peer_count(QI_GETKEY) == 1, "a rekey of the IKE_SA asked for a key");
		one_rekey(&pair, TRUE, &steps[0], ACT_GOOD);
		one_rekey(&pair, FALSE, &steps[0], ACT_GOOD);
		check(peer_count(QI_SENT) == 1, "after an IKE_SA rekey nothing is confirmed");
	}
	world_end(&pair);
	group("rekey of an IKE_SA and CHILD_SAs behind it");
}

/** The calls of an initiator for one CHILD_SA, and for how many ms it may wait in
 *  each: docs/plugin-protocol.md. A CHILD_SA that it makes waits 2 s at most. */
static const struct {
	u_int step;
	u_int ms;
} waits[] = {
	{ 0, 600 }, { 1, 300 }, { 3, 600 }, { 6, 200 }, { 7, 200 },
};
#define WAIT_OF_ALL 2000
/** The rest of a CHILD_SA: BIND and two ADDs of the responder, which is here, too. */
#define WAIT_OF_RESPONDER 1000
#define TRIES 3

/** How long a CHILD_SA takes that fails at a step by an answer spoilt like that. */
static u_int failing_takes(const step_t *step, act_t act)
{
	world_pair_t pair;
	uint64_t start;
	u_int took;

	reset();
	peer_script(step->kind, step->nth, act);
	check(world_pair(&pair, "link"), "no IKE_SAs");
	start = now_ms();
	world_initiate(&pair);
	took = now_ms() - start;
	/* no call of it is made behind one that is late */
	check(!world_children(pair.init) && peer_count(QI_SENT) == step->sent &&
		  peer_count(QI_BIND) == step->bind && peer_count(QI_ADD_SA) == step->add,
		  "%s %s: %u CHILD_SAs, %u SENT, %u BIND, %u ADD", step->name, act_names[act],
		  world_children(pair.init), peer_count(QI_SENT), peer_count(QI_BIND),
		  peer_count(QI_ADD_SA));
	world_end(&pair);
	return took;
}

/** By how much this machine wakes up late, in ms, from a sleep of ms. */
static u_int oversleeps(u_int ms)
{
	uint64_t start = now_ms();

	usleep(ms * 1000);
	return max(now_ms() - start, ms) - ms;
}

/** Silence at each call of the initiator: what it waits is what a refusal at once
 *  does not take. Noise adds only, so the best of a few tries counts, and the worst
 *  of the control in between; and all of it takes no less than the wait. */
static void limits_of_calls(void)
{
	u_int i, try, ms, late, control, noise, waited, sum = 0, margin = 0;
	const step_t *step;

	for (i = 0; i < countof(waits); i++)
	{
		step = &steps[waits[i].step];
		ms = waits[i].ms;
		control = late = UINT_MAX;
		noise = 0;
		for (try = 0; try < TRIES; try++)
		{
			u_int refused = failing_takes(step, ACT_REFUSE);

			control = min(control, refused);
			noise = max(noise, refused - control + oversleeps(ms / 3));
			late = min(late, failing_takes(step, ACT_LATE));
			waited = max(late, control) - control;
			if (waited <= ms + 20)
			{
				break;
			}
		}
		noise += 20;
		check(late >= ms && waited <= ms + noise,
			  "silence at %s: waited %u ms, not %u (control %u ms, its noise %u)",
			  step->name, waited, ms, control, noise);
		sum += waited;
		margin += noise;
	}
	check(sum <= WAIT_OF_ALL + margin,
		  "the calls of one CHILD_SA: waited %u ms in all (noise %u)", sum, margin);
}

/** Every call of one CHILD_SA takes 9/10 of what it may: the CHILD_SA is made, in
 *  bounded time. Then its last one is late as well. */
static void limits_of_a_child(act_t last)
{
	u_int i, try, took, want = 0, control = UINT_MAX;
	world_pair_t pair;
	uint64_t start;
	bool made = FALSE;

	for (try = 0; try < 2 * TRIES && !made; try++)
	{
		reset();
		check(world_pair(&pair, "link"), "no IKE_SAs");
		start = now_ms();
		world_initiate(&pair);
		control = min(control, now_ms() - start);
		world_end(&pair);
		reset();
		want = 0;
		for (i = 0; i < countof(waits); i++)
		{
			const step_t *step = &steps[waits[i].step];

			peer_setup.slow[step->kind] = waits[i].ms * 9 / 10;
			peer_script(step->kind, 0, ACT_SLOW);
			want += waits[i].ms * 9 / 10;
		}
		if (last != ACT_SLOW)
		{	/* instead of those of the other ADDs */
			peer_script(QI_ADD_SA, 4, last);
		}
		check(world_pair(&pair, "link"), "no IKE_SAs");
		start = now_ms();
		world_initiate(&pair);
		took = now_ms() - start;
		made = last == ACT_SLOW ? world_children(pair.init) == 1
								: peer_count(QI_ADD_SA) == 4;
		check(last == ACT_SLOW || !world_children(pair.init),
			  "a CHILD_SA although its last ADD was %s", act_names[last]);
		check(took <= WAIT_OF_ALL + WAIT_OF_RESPONDER + 3 * control + 200,
			  "all calls slow, the last one %s: %u ms at both ends (control %u)",
			  act_names[last], took, control);
		world_end(&pair);
	}
	/* on a machine that is busy one of the calls may have been late by itself */
	check(made, "all calls slow, the last one %s: no CHILD_SA came so far in %u tries",
		  act_names[last], try);
	check(!made || last != ACT_SLOW || took >= want,
		  "all calls slow: it took %u ms, less than the %u of the initiator's calls",
		  took, want);
}

static void limits(void)
{
	check(peer_wait(QI_HELLO, 1), "no HELLO");
	limits_of_calls();
	limits_of_a_child(ACT_SLOW);
	limits_of_a_child(ACT_LATE);
	group("a CHILD_SA waits for qipsecd at most 2 s");
}

/** TRUE if the side has one CHILD_SA, and its packets lead into that. */
static bool sends(ike_sa_t *ike_sa)
{
	enumerator_t *enumerator;
	child_sa_t *child;
	u_int all = 0, leading = 0;

	enumerator = ike_sa->create_child_sa_enumerator(ike_sa);
	while (enumerator->enumerate(enumerator, &child))
	{
		if (child->get_state(child) == CHILD_INSTALLED)
		{
			all++;
			leading += child->get_outbound_state(child) == CHILD_OUTBOUND_INSTALLED;
		}
	}
	enumerator->destroy(enumerator);
	return all == 1 && leading == 1;
}

/** Both sides rekey at once, and one of the requests is refused: the CHILD_SA that
 *  the other one made carries the packets of both. */
static void collisions(void)
{
	world_pair_t pair;
	u_int nth;

	for (nth = 1; nth <= 2; nth++)
	{
		reset();
		check(world_pair(&pair, "link"), "no IKE_SAs");
		world_initiate(&pair);
		reset();
		peer_script(QI_BIND, nth, ACT_REFUSE);
		rekey(pair.init);
		rekey(pair.resp);
		world_deliver(&pair);
		check(world_logged("while it refused our own rekeying"),
			  "BIND %u of a collision refused: charon's care was enough", nth);
		check(sends(pair.init) && sends(pair.resp),
			  "BIND %u of a collision refused: %u and %u CHILD_SAs, they send: %u and %u",
			  nth, world_children(pair.init), world_children(pair.resp),
			  sends(pair.init), sends(pair.resp));
		world_end(&pair);
	}
	group("a collision of which one request is refused");
}

/** Whether a nonce carries a Key-ID depends on whose request it is for, not on
 *  whose message is being handled. */
static void roles(void)
{
	enumerator_t *enumerator;
	world_pair_t pair;
	child_sa_t *child;

	/* the peer moved, and with it dynamic selectors: charon rekeys before it answers */
	reset();
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	reset();
	world_notify = (struct world_notify){ INFORMATIONAL, UPDATE_SA_ADDRESSES,
										  (uint8_t*)"", 0 };
	pair.init->set_my_host(pair.init, host_create_from_string("127.0.0.3", 500));
	world_ping(&pair);
	world_deliver(&pair);
	world_notify.data = NULL;
	check(peer_count(QI_GETKEY) == 1 && peer_count(QI_SENT) == 1 &&
		  peer_count(QI_BIND) == 2 && peer_confirmed(QI_BIND) == 2,
		  "rekey within a request of the peer: %u GETKEY, %u SENT, %u BIND",
		  peer_count(QI_GETKEY), peer_count(QI_SENT), peer_count(QI_BIND));
	world_end(&pair);

	/* the peer deleted the CHILD_SA, which is to be up: likewise */
	reset();
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	reset();
	enumerator = pair.resp->create_child_sa_enumerator(pair.resp);
	if (enumerator->enumerate(enumerator, &child))
	{
		child->set_close_action(child, ACTION_START);
	}
	enumerator->destroy(enumerator);
	charon->bus->set_sa(charon->bus, pair.init);
	pair.init->delete_child_sa(pair.init, PROTO_ESP, world_spi(pair.init), FALSE);
	charon->bus->set_sa(charon->bus, NULL);
	world_deliver(&pair);
	check(peer_count(QI_GETKEY) == 1 && peer_count(QI_SENT) == 1 &&
		  world_children(pair.init) == 1 && world_children(pair.resp) == 1,
		  "start within a request of the peer: %u GETKEY, %u SENT, %u and %u CHILD_SAs",
		  peer_count(QI_GETKEY), peer_count(QI_SENT), world_children(pair.init),
		  world_children(pair.resp));
	world_end(&pair);

	/* both ask: while ours is under way, the nonce for theirs is Nr */
	reset();
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	reset();
	rekey(pair.init);
	rekey(pair.resp);
	world_deliver(&pair);
	check(peer_count(QI_GETKEY) == 2 && peer_count(QI_SENT) == 2 &&
		  world_children(pair.init) == 1 && world_children(pair.resp) == 1,
		  "rekeys by both: %u GETKEY, %u SENT, %u and %u CHILD_SAs",
		  peer_count(QI_GETKEY), peer_count(QI_SENT), world_children(pair.init),
		  world_children(pair.resp));
	check(peer_count(QI_BIND) && peer_confirmed(QI_BIND) == peer_count(QI_BIND),
		  "rekeys by both: %u of %u BINDs with a confirmation",
		  peer_confirmed(QI_BIND), peer_count(QI_BIND));
	world_end(&pair);
	group("requests of both sides within each other");
}

/** Changes the type of each support notify in a packet. */
static void hide_support(chunk_t packet)
{
	size_t i;

	for (i = 28; i + 10 < packet.len; i++)
	{
		if (memeq(packet.ptr + i, "\xa0\x1eQ-IPsec\x01", 10))
		{
			packet.ptr[i + 1] = 0x1d;
		}
	}
}

static void tamper_response(chunk_t packet, bool request)
{
	if (!request)
	{
		hide_support(packet);
	}
}

static void tamper_request(chunk_t packet, bool request)
{
	if (request)
	{
		hide_support(packet);
	}
}

/** Changes bytes of either message, so that it stays one of IKE_SA_INIT. */
static void tamper_random(chunk_t packet, bool request)
{
	u_int n = 1 + random() % 3;

	while (n--)
	{
		packet.ptr[28 + random() % (packet.len - 28)] ^= 1 + random() % 255;
	}
}

/** Changes one byte of a support notify, from its length on. */
static void tamper_notify(chunk_t packet, bool request)
{
	size_t i;

	for (i = 28; i + 10 < packet.len; i++)
	{
		if (memeq(packet.ptr + i, "\xa0\x1eQ-IPsec\x01", 10))
		{
			packet.ptr[i - 4 + random() % 15] ^= 1 + random() % 255;
			return;
		}
	}
}

static void messages(void)
{
	world_pair_t pair;
	u_int i;

	reset();
	world_tamper = tamper_response;
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	check(!world_children(pair.init) && !peer_count(QI_BIND) &&
		  peer_wait(QI_IGNORED, 1), "the answer of a stock peer is not ignored");
	world_end(&pair);
	reset();
	peer_setup.policy = QI_OPTIONAL;
	peer_setup.key = FALSE;
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	check(!peer_count(QI_IGNORED) && !world_children(pair.init),
		  "optional: the answer was ignored, or its change not noticed");
	world_end(&pair);
	reset();
	world_tamper = tamper_request;
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	check(!world_children(pair.resp), "a request without the notify was accepted");
	world_end(&pair);
	group("IKE_SA_INIT without the notify");

	srandom(1);
	for (i = 0; i < 300; i++)
	{
		reset();
		world_tamper = i % 2 ? tamper_random : tamper_notify;
		check(world_pair(&pair, "link"), "no IKE_SAs");
		world_initiate(&pair);
		check(!world_kernel.added && !world_children(pair.init),
			  "changed IKE_SA_INIT number %u: a CHILD_SA", i);
		world_end(&pair);
	}
	world_tamper = NULL;
	group("IKE_SA_INIT with changed bytes");
}

static void confirmations(void)
{
	static const struct {
		size_t len;
		/** of all BINDs: the other notify of the message stands behind this one */
		u_int confirmed;
	} cases[] = { { 1, 0 }, { 7, 0 }, { 8, 0 }, { 39, 0 }, { 40, 2 }, { 41, 0 }, { 2000, 0 } };
	uint8_t data[2000] = "Q-IPsec\x01";
	world_pair_t pair;
	u_int i;

	for (i = 0; i < countof(cases); i++)
	{
		reset();
		world_notify = (struct world_notify){ IKE_AUTH, 40991, data, cases[i].len };
		check(world_pair(&pair, "link"), "no IKE_SAs");
		world_initiate(&pair);
		check(peer_confirmed(QI_BIND) == cases[i].confirmed,
			  "notify of %u bytes: %u confirmations in BIND, not %u",
			  (u_int)cases[i].len, peer_confirmed(QI_BIND), cases[i].confirmed);
		world_end(&pair);
	}
	world_notify.data = NULL;
	reset();
	check(world_pair(&pair, "link"), "no IKE_SAs");
	world_initiate(&pair);
	check(peer_confirmed(QI_BIND) == 2, "%u confirmations in BIND, not 2",
		  peer_confirmed(QI_BIND));
	world_end(&pair);
	group("confirmations of every length");
}

/** An SA for the hooks of the kernel interface. */
typedef struct {
	kernel_ipsec_sa_id_t id;
	kernel_ipsec_add_sa_t data;
	linked_list_t *src, *dst;
	uint8_t keys[4][300];
} sa_t;

static sa_t *sa_create(size_t encr, size_t integ, char *net, u_int selectors)
{
	traffic_selector_t *ts;
	sa_t *this;
	u_int i;

	INIT(this,
		.id = {
			.src = host_create_from_string(strchr(net, ':') ? "::1" : "127.0.0.1", 500),
			.dst = host_create_from_string(strchr(net, ':') ? "::2" : "127.0.0.2", 500),
			.spi = htonl(0x1234),
			.proto = IPPROTO_ESP,
		},
		.src = linked_list_create(),
		.dst = linked_list_create(),
	);
	for (i = 0; i < selectors; i++)
	{
		ts = traffic_selector_create_from_cidr(net, 0, 0, 65535);
		this->src->insert_last(this->src, ts->clone(ts));
		this->dst->insert_last(this->dst, ts);
	}
	for (i = 0; i < 4; i++)
	{
		memset(this->keys[i], 0x10 + i, sizeof(this->keys[i]));
	}
	this->data = (kernel_ipsec_add_sa_t){
		.src_ts = this->src,
		.dst_ts = this->dst,
		.mode = MODE_TUNNEL,
		.enc_alg = encr ? ENCR_AES_CBC : ENCR_UNDEFINED,
		.int_alg = integ ? AUTH_HMAC_SHA2_256_128 : AUTH_UNDEFINED,
		.enc_key = encr ? chunk_create(this->keys[0], encr) : chunk_empty,
		.int_key = integ ? chunk_create(this->keys[1], integ) : chunk_empty,
		.initiator = TRUE,
#ifdef CPU_ID_MAX
		.cpu = CPU_ID_MAX,
#endif
	};
	return this;
}

static void sa_destroy(sa_t *this)
{
	this->id.src->destroy(this->id.src);
	this->id.dst->destroy(this->id.dst);
	this->src->destroy_offset(this->src, offsetof(traffic_selector_t, destroy));
	this->dst->destroy_offset(this->dst, offsetof(traffic_selector_t, destroy));
	free(this);
}

static bool expect_sa(sa_t *sa)
{
	chunk_t encr = sa->data.enc_key, integ = sa->data.int_key;

	return qi_expect(encr, integ, encr.len ? chunk_create(sa->keys[2], encr.len) : encr,
					 integ.len ? chunk_create(sa->keys[3], integ.len) : integ);
}

static bool add(sa_t *sa)
{
	return charon->kernel->add_sa(charon->kernel, &sa->id, &sa->data) == SUCCESS;
}

/** Makes it the SA to the initiator, with its token, or that from it. */
static void turn(sa_t *sa, bool inbound)
{
	if (sa->data.enc_key.len)
	{
		sa->data.enc_key.ptr = sa->keys[inbound ? 2 : 0];
	}
	if (sa->data.int_key.len)
	{
		sa->data.int_key.ptr = sa->keys[inbound ? 3 : 1];
	}
	sa->data.inbound = inbound;
}

/** ADD of one SA in forms that IKE_SAs of the other cases do not have. */
static void forms(void)
{
	static const struct {
		const char *name;
		size_t encr, integ;
		char *net;
		u_int selectors;
		bool good;
	} cases[] = {
		{ "AEAD", 36, 0, "10.0.0.0/8", 1, TRUE },
		{ "no encryption", 0, 32, "10.0.0.0/8", 1, TRUE },
		{ "IPv6", 32, 32, "fd00::/8", 1, TRUE },
		{ "no selectors", 32, 32, "10.0.0.0/8", 0, TRUE },
		{ "128 selectors", 32, 32, "fd00::/8", 64, TRUE },
		{ "too many selectors", 32, 32, "fd00::/8", 2000, FALSE },
		{ "largest token", 256, 0, "10.0.0.0/8", 1, TRUE },
		{ "token too large", 257, 0, "10.0.0.0/8", 1, FALSE },
		{ "token too large in all", 200, 57, "10.0.0.0/8", 1, FALSE },
		{ "no keys", 0, 0, "10.0.0.0/8", 1, FALSE },
	};
	sa_t *sa;
	u_int i, use_key;

	for (i = 0; i < countof(cases); i++)
	{
		for (use_key = 0; use_key < 2; use_key++)
		{
			reset();
			peer_setup.use_key = use_key;
			sa = sa_create(cases[i].encr, cases[i].integ, cases[i].net,
						   cases[i].selectors);
			check(expect_sa(sa) == (cases[i].good || cases[i].selectors > 64),
				  "%s: token", cases[i].name);
			check(add(sa) == cases[i].good, "%s: 1st SA", cases[i].name);
			turn(sa, TRUE);
			check(add(sa) == cases[i].good, "%s: 2nd SA", cases[i].name);
			check(world_kernel.added == (cases[i].good && use_key ? 2 : 0) &&
				  !world_kernel.other_keys, "%s: keys", cases[i].name);
			check(!peer_complaint(), "%s: %s", cases[i].name, peer_complaint());
			sa_destroy(sa);
		}
	}
	group("SAs of every form");
}

static void tokens(void)
{
	sa_t *sa = sa_create(32, 32, "10.0.0.0/8", 1);
	u_int i;

	reset();
	check(!add(sa) && world_logged("not a token"), "a key that is no token");
	check(expect_sa(sa) && add(sa), "a token");
	check(!add(sa) && world_logged("used before"), "a token again");
	turn(sa, TRUE);
	sa->data.inbound = FALSE;
	check(!add(sa) && world_logged("other direction"), "that of the other direction");
	sa->data.inbound = TRUE;
	world_log_reset();
	check(!add(sa) && world_logged("not a token"), "both tokens were taken");
	turn(sa, FALSE);
	peer_script(QI_ADD_SA, 0, ACT_REFUSE);
	check(expect_sa(sa) && !add(sa), "a refused ADD");
	turn(sa, TRUE);
	check(!add(sa) && world_logged("other SA of its CHILD_SA failed"),
		  "the second SA after that");
#ifdef QI_SA_cpu
	reset();
	sa->data.cpu = 0;
	turn(sa, FALSE);
	check(expect_sa(sa) && !add(sa) && world_logged("per CPU") &&
		  !peer_count(QI_ADD_SA), "an SA per CPU");
	turn(sa, TRUE);
	check(!add(sa), "the other one of that CPU");
#endif
	sa_destroy(sa);
	reset();
	sa = sa_create(32, 32, "10.0.0.0/8", 1);
	for (i = 0; i < 256; i++)
	{
		check(expect_sa(sa), "token %u", i);
	}
	check(!expect_sa(sa), "more tokens than there can be");
	sa_destroy(sa);
	group("tokens");
}

static status_t query(sa_t *sa, uint64_t *bytes, uint64_t *packets, time_t *used)
{
	kernel_ipsec_query_sa_t data = { };

	return charon->kernel->query_sa(charon->kernel, &sa->id, &data, bytes, packets,
									used);
}

static void queries(void)
{
	static const step_t step = { .kind = QI_QUERY, .needs_tlv = TRUE };
	static const step_t update = { .kind = QI_UPDATE };
	sa_t *sa = sa_create(32, 32, "10.0.0.0/8", 1);
	kernel_ipsec_update_sa_t data = { .new_src = sa->id.dst, .new_dst = sa->id.src };
	uint64_t bytes = 0, packets = 0, start;
	u_int i, files = count_files();
	time_t used;
	act_t act;

	for (act = ACT_GOOD; act < ACT_ALL; act++)
	{
		reset();
		peer_script(QI_QUERY, 0, act);
		peer_script(QI_UPDATE, 0, act);
		start = now_ms();
		check((query(sa, &bytes, &packets, &used) == SUCCESS) == harmless(&step, act),
			  "QUERY %s", act_names[act]);
		check((charon->kernel->update_sa(charon->kernel, &sa->id, &data) == SUCCESS) ==
			  harmless(&update, act), "UPDATE %s", act_names[act]);
		check(now_ms() - start < 3000, "QUERY and UPDATE %s: took too long",
			  act_names[act]);
		check(!world_kernel.queried && !world_kernel.updated,
			  "QUERY or UPDATE %s: charon's own was called", act_names[act]);
	}
	reset();
	check(query(sa, &bytes, &packets, &used) == SUCCESS &&
		  bytes == 0x0101010101010101 && packets == 0x0202020202020202, "numbers");
	check(query(sa, NULL, NULL, NULL) == SUCCESS, "QUERY for nothing");
	data.new_reqid = 7;
	check(charon->kernel->update_sa(charon->kernel, &sa->id, &data) == NOT_SUPPORTED &&
		  peer_count(QI_UPDATE) == 1 - 1, "a new reqid");
	srandom(2);
	for (i = 0; i < 3000; i++)
	{
		peer_script(QI_QUERY, 0, ACT_MUTATE);
		query(sa, &bytes, &packets, &used);
	}
	check(peer_count(QI_QUERY) >= 3000, "%u queries", peer_count(QI_QUERY));
	check(files_are(files), "open files");
	sa_destroy(sa);
	group("QUERY and UPDATE, and 3000 mutated answers");
}

/** qipsecd comes, goes and does not accept. */
static void absence(void)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	sa_t *sa = sa_create(32, 32, "10.0.0.0/8", 1);
	uint64_t bytes, packets, start;
	world_pair_t pair;
	time_t used;
	int fd;

	reset();
	peer_stop();
	check(query(sa, &bytes, &packets, &used) == FAILED && world_logged("not reachable"),
		  "QUERY without a peer");
	check(world_pair(&pair, "link") && world_initiate(&pair) != SUCCESS &&
		  !world_children(pair.init), "a CHILD_SA without a peer");
	world_end(&pair);

	/* two connections wait in the queue, for the third connect() itself waits */
	strcpy(addr.sun_path, this_run.socket);
	fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	check(bind(fd, (struct sockaddr*)&addr, sizeof(addr)) == 0 && listen(fd, 0) == 0,
		  "socket");
	start = now_ms();
	check(query(sa, &bytes, &packets, &used) == FAILED &&
		  query(sa, &bytes, &packets, &used) == FAILED &&
		  query(sa, &bytes, &packets, &used) == FAILED, "nobody accepts");
	check(now_ms() - start < 5000, "nobody accepts: it took too long");
	close(fd);

	check(peer_back(), "no HELLO again");
	check(query(sa, &bytes, &packets, &used) == SUCCESS, "QUERY of the new peer");
	sa_destroy(sa);
	group("a peer that goes, does not accept and comes again");
}

static void hellos(void)
{
	act_t act;

	for (act = ACT_REFUSE; act < ACT_BARE; act++)
	{
		if (act == ACT_REFUSE_BARE || act == ACT_REFUSE_LONG || act == ACT_LATE)
		{	/* 2 s each; the thread waits for a late one in mode "hang" */
			continue;
		}
		peer_stop();
		reset();
		peer_script(QI_HELLO, 0, act);
		/* a second one after a refusal would come 2 s later */
		check(peer_start(this_run.socket) &&
			  peer_wait(QI_HELLO, act < ACT_CLOSE || act == ACT_ABI_REFUSE ? 1 : 2),
			  "HELLO %s: no further one", act_names[act]);
		usleep(20000);
		check(!world_logged("qipsecd is there"), "HELLO %s: taken for good",
			  act_names[act]);
	}
	peer_stop();
	check(peer_back(), "no HELLO again");
	group("HELLO");
}

static void off(void)
{
	world_pair_t pair;

	reset();
	check(world_pair(&pair, "stock"), "no IKE_SAs");
	world_initiate(&pair);
	check(world_children(pair.init) == 1 && world_children(pair.resp) == 1 &&
		  world_kernel.added == 4 && !peer_count(QI_GETKEY) && !peer_count(QI_BIND) &&
		  !peer_count(QI_ADD_SA), "a connection in off is no stock one");
	world_end(&pair);
	group("a connection in the setting off");
}

/** All that needs a plugin in its place. */
static void fit(void)
{
	world_pair_t pair;

	check(peer_wait(QI_HELLO, 1), "no HELLO");
	group("start");
	all_steps();
	rekeys();
	collisions();
	roles();
	messages();
	confirmations();
	off();
	if (check(world_pair(&pair, "link"), "no IKE_SAs"))
	{
		charon->bus->set_sa(charon->bus, pair.init);
		forms();
		tokens();
		queries();
		absence();
		charon->bus->set_sa(charon->bus, NULL);
		world_end(&pair);
	}
	hellos();
}

/** The kernel backend lacks what the plugin needs. */
static void unfit(void)
{
	world_pair_t pair;

	reset();
	check(world_pair(&pair, "link") && world_initiate(&pair) != SUCCESS &&
		  !peer_count(QI_GETKEY) && world_logged("KERNEL_POLICY_SPI"),
		  "the plugin works on a kernel backend that it refuses");
	world_end(&pair);
	group("a kernel backend without KERNEL_POLICY_SPI");
	off();
}

/** The plugin is of another build than charon. */
static void other_build(void)
{
	world_pair_t pair;

	check(!world_pair(&pair, "link") && !peer_count(QI_HELLO) &&
		  world_logged("No IKEv2 connection is possible"),
		  "a plugin of another build lets IKE_SAs be");
	world_end(&pair);
	group("a plugin of another build");
}

int main(int argc, char *argv[])
{
	static const struct {
		const char *name;
		void (*run)(void);
		kernel_feature_t features;
		char *off;
	} modes[] = {
		{ "fit", fit, KERNEL_POLICY_SPI, "mgmt, stock" },
		{ "unfit", unfit, 0, "stock" },
		{ "other-build", other_build, KERNEL_POLICY_SPI, NULL },
		{ "limits", limits, KERNEL_POLICY_SPI, NULL },
		{ "hang", NULL, KERNEL_POLICY_SPI, NULL },
	};
	uint64_t start;
	u_int i;

	if (argc != 3)
	{
		return 2;
	}
	this_run.socket = argv[2];
	for (i = 0; i < countof(modes); i++)
	{
		if (!streq(argv[1], modes[i].name))
		{
			continue;
		}
		if (modes[i].run == limits)
		{
			world_patience = 1;
		}
		peer_reset();
		peer_script(QI_HELLO, 0, modes[i].run ? ACT_GOOD : ACT_LATE);
		if (!peer_start(argv[2]) ||
			!world_start(argv[2], modes[i].off, modes[i].features))
		{
			printf("not ok - plugin-asan: charon does not start\n");
			return 1;
		}
		if (modes[i].run)
		{
			modes[i].run();
		}
		start = now_ms();
		world_stop();
		check(now_ms() - start < 3000, "%s: the end took too long", argv[1]);
		group("end");
		peer_stop();
	}
	return this_run.any_failed;
}
