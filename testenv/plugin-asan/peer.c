/*
 * plugin-asan: the scripted peer at the plugin's socket.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

#include "../../ike/charon/qipsec_protocol.h"
#include "peer.h"

#define MAX_HELD 64
#define CONFIRM_LEN 32

const char *const act_names[] = {
	"good", "sent twice", "filled up", "refused", "refused without text",
	"refused at length", "refused with %s", "closed", "closed unread", "empty",
	"7 bytes", "too large", "wrong magic", "wrong ABI", "refused in another ABI",
	"header's zero byte set", "noise", "of another request", "late", "no TLVs",
	"TLV header cut off", "last TLV cut off", "TLV beyond the end",
	"TLVs too short", "TLVs too long", "mutated", "slow",
};

struct peer_setup peer_setup;

static struct {
	struct sockaddr_un addr;
	pthread_t thread;
	int listen, stop;
	/** standing connections */
	int held[MAX_HELD];
	u_int nheld;
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	/** guarded by mutex, indexed by kind of request */
	u_int count[256], confirmed[256], nth[256];
	act_t act[256];
	const char *complaint;
} peer = {
	.mutex = PTHREAD_MUTEX_INITIALIZER,
	.changed = PTHREAD_COND_INITIALIZER,
};

typedef struct {
	uint8_t b[QI_MAX_FRAME + 16];
	size_t len;
} frame_t;

static void complain(const char *what)
{
	pthread_mutex_lock(&peer.mutex);
	peer.complaint = what;
	pthread_mutex_unlock(&peer.mutex);
}

static u_int get16(const uint8_t *b)
{
	return b[0] << 8 | b[1];
}

static void put16(uint8_t *b, u_int n)
{
	b[0] = n >> 8;
	b[1] = n;
}

static void begin(frame_t *f, uint8_t kind)
{
	memset(f->b, 0, sizeof(f->b));
	put16(f->b, QI_MAGIC >> 16);
	put16(f->b + 2, QI_MAGIC & 0xffff);
	put16(f->b + 4, QI_ABI);
	f->b[6] = kind;
	f->len = QI_HEADER;
}

static void put(frame_t *f, u_int tag, int fill, size_t len)
{
	put16(f->b + f->len, tag);
	put16(f->b + f->len + 2, len);
	memset(f->b + f->len + 4, fill, len);
	f->len += 4 + len;
}

/** A TLV of a request; NULL: not there. */
static uint8_t *get(frame_t *f, u_int tag, size_t *len)
{
	size_t pos = QI_HEADER;

	while (f->len - pos >= 4)
	{
		*len = get16(f->b + pos + 2);
		if (*len > f->len - pos - 4)
		{
			complain("a TLV runs over its frame");
			return NULL;
		}
		if (get16(f->b + pos) == tag)
		{
			return f->b + pos + 4;
		}
		pos += 4 + *len;
	}
	if (pos != f->len)
	{
		complain("a frame ends within a TLV");
	}
	return NULL;
}

static void inspect(frame_t *f)
{
	uint8_t *keys, *token;
	size_t n, m;

	if (f->len < QI_HEADER || get16(f->b + 4) != QI_ABI ||
		!get(f, QI_T_INSTANCE, &n) || n != 16 || !get(f, QI_T_DEADLINE, &n) || n != 8)
	{
		complain("a request begins otherwise");
	}
	if (f->b[6] == QI_BIND)
	{
		keys = get(f, QI_T_KEYMAT_EI, &n);
		token = get(f, QI_T_TOKEN_EI, &m);
		if (!keys || !token || n != m || memcmp(keys, token, n) == 0)
		{
			complain("BIND without keys and a token of their length");
		}
	}
}

/** The answer of a qipsecd that allows everything. */
static void answer(frame_t *request, frame_t *f)
{
	size_t token, n;
	uint8_t *len;

	begin(f, QI_OK);
	switch (request->b[6])
	{
		case QI_GETKEY:
			put(f, QI_T_POLICY, peer_setup.policy, 1);
			if (peer_setup.key)
			{
				put(f, QI_T_KEY_ID, 0x4b, 16);
			}
			break;
		case QI_SENT:
			put(f, QI_T_CONFIRM, 0xc1, CONFIRM_LEN);
			break;
		case QI_BIND:
			len = get(request, QI_T_RESPONDER, &n);
			if (len && *len)
			{
				put(f, QI_T_CONFIRM, 0xc2, CONFIRM_LEN);
			}
			break;
		case QI_ADD_SA:
			f->b[6] = QI_INSTALLED;
			len = get(request, QI_T_ENCR_LEN, &n);
			if (peer_setup.use_key && len && get(request, QI_T_TOKEN, &token))
			{
				f->b[6] = QI_USE_KEY;
				put(f, QI_T_ENCR_KEY, PEER_ENCR, get16(len));
				put(f, QI_T_INTEG_KEY, PEER_INTEG, token - get16(len));
			}
			break;
		case QI_ACK:
			f->b[6] = QI_COMMITTED;
			break;
		case QI_QUERY:
			put(f, QI_T_BYTES, 1, 8);
			put(f, QI_T_PACKETS, 2, 8);
			put(f, QI_T_LAST_USE, 3, 8);
			break;
	}
}

/** Makes every TLV longer by grow bytes. */
static void resize(frame_t *f, int grow)
{
	frame_t old = *f;
	size_t pos = QI_HEADER;
	u_int len;

	f->len = QI_HEADER;
	while (old.len - pos >= 4)
	{
		len = get16(old.b + pos + 2);
		put(f, get16(old.b + pos), old.b[pos + 4], len + grow);
		pos += 4 + len;
	}
}

static void refuse(frame_t *f, const char *text, size_t len)
{
	begin(f, QI_REFUSE);
	put(f, QI_T_TEXT, 'x', len);
	memcpy(f->b + f->len - len, text, strlen(text));
}

static void noise(uint8_t *b, size_t len)
{
	while (len--)
	{
		*b++ = random();
	}
}

static void mutate(frame_t *f)
{
	u_int n = 1 + random() % 4;

	while (n--)
	{
		f->b[random() % f->len] = random() % 3 ? random() : 0xff;
	}
	if (random() % 3 == 0)
	{
		f->len = random() % (f->len + 1);
	}
}

static void spoil(frame_t *f, act_t act)
{
	static const char format[] = "%s%n%H%1000000d%";

	switch (act)
	{
		case ACT_FULL:
			put(f, 999, 0xaa, QI_MAX_FRAME - f->len - 4);
			break;
		case ACT_REFUSE:
			refuse(f, PEER_REFUSAL, strlen(PEER_REFUSAL));
			break;
		case ACT_REFUSE_BARE:
			begin(f, QI_REFUSE);
			break;
		case ACT_REFUSE_LONG:
			refuse(f, PEER_REFUSAL, 4000);
			break;
		case ACT_REFUSE_FORMAT:
			refuse(f, format, strlen(format));
			break;
		case ACT_EMPTY:
			f->len = 0;
			break;
		case ACT_STUB:
			f->len = QI_HEADER - 1;
			break;
		case ACT_OVERSIZE:
			put(f, 999, 0xaa, QI_MAX_FRAME + 1 - f->len - 4);
			break;
		case ACT_MAGIC:
			f->b[0] ^= 1;
			break;
		case ACT_ABI_REFUSE:
			refuse(f, PEER_REFUSAL, strlen(PEER_REFUSAL));
			/* fall through */
		case ACT_ABI:
			put16(f->b + 4, QI_ABI + 1);
			break;
		case ACT_ZERO:
			f->b[7] = 1;
			break;
		case ACT_NOISE:
			f->len = 100;
			noise(f->b, f->len);
			break;
		case ACT_KIND:
			f->b[6] = f->b[6] == QI_COMMITTED ? QI_OK : QI_COMMITTED;
			break;
		case ACT_BARE:
			f->len = QI_HEADER;
			break;
		case ACT_CUT:
			f->len = QI_HEADER + 3;
			break;
		case ACT_TAIL:
			f->len -= f->len > QI_HEADER;
			break;
		case ACT_OVERRUN:
			f->len += f->len == QI_HEADER ? 4 : 0;
			put16(f->b + QI_HEADER + 2, 0xffff);
			break;
		case ACT_SHORTER:
			resize(f, -1);
			break;
		case ACT_LONGER:
			resize(f, 1);
			break;
		case ACT_MUTATE:
			mutate(f);
			break;
		default:
			break;
	}
}

/** Counts a request and gives what the script has for it. */
static act_t next_act(uint8_t kind, bool confirmed)
{
	act_t act = ACT_GOOD;
	u_int n;

	pthread_mutex_lock(&peer.mutex);
	n = ++peer.count[kind];
	peer.confirmed[kind] += confirmed;
	if (peer.act[kind] && (!peer.nth[kind] || peer.nth[kind] == n))
	{
		act = peer.act[kind];
	}
	pthread_cond_broadcast(&peer.changed);
	pthread_mutex_unlock(&peer.mutex);
	return act;
}

/** Answers one request as the script has it; gives its kind if the connection
 *  goes on, else 0. */
static uint8_t serve(int fd)
{
	struct pollfd in = { .fd = fd, .events = POLLIN }, gone = { .fd = fd };
	frame_t request, f;
	uint8_t kind;
	ssize_t n;
	size_t len;
	act_t act;

	/* peeked at, so that ACT_UNREAD leaves it in the socket */
	n = poll(&in, 1, 1000) == 1 ? recv(fd, request.b, sizeof(request.b), MSG_PEEK) : 0;
	if (n < QI_HEADER)
	{
		return 0;
	}
	request.len = n;
	kind = request.b[6];
	if (kind != QI_ACK && kind != QI_END)
	{
		inspect(&request);
	}
	act = next_act(kind, get(&request, QI_T_CONFIRM, &len) != NULL);
	if (act == ACT_UNREAD)
	{
		return 0;
	}
	recv(fd, request.b, sizeof(request.b), 0);
	if (act == ACT_CLOSE || kind == QI_END || kind == QI_IGNORED)
	{
		return 0;
	}
	answer(&request, &f);
	spoil(&f, act);
	if (act == ACT_LATE)
	{
		poll(&gone, 1, 4000);
	}
	else if (act == ACT_SLOW)
	{
		poll(&gone, 1, peer_setup.slow[kind]);
	}
	send(fd, f.b, f.len, MSG_NOSIGNAL);
	if (act == ACT_DOUBLE)
	{
		send(fd, f.b, f.len, MSG_NOSIGNAL);
	}
	return f.b[6] == QI_REFUSE ? 0 : kind;
}

/** A connection: one call, or the standing one, which is held. */
static void serve_connection(int fd)
{
	uint8_t kind = serve(fd);

	if (kind == QI_HELLO && peer.nheld < MAX_HELD)
	{
		peer.held[peer.nheld++] = fd;
		return;
	}
	if (kind == QI_ADD_SA && !peer_setup.use_key)
	{
		serve(fd);
	}
	close(fd);
}

static void *run(void *unused)
{
	struct pollfd pfd[] = {
		{ .fd = peer.stop, .events = POLLIN },
		{ .fd = peer.listen, .events = POLLIN },
	};
	int fd;

	(void)unused;
	while (poll(pfd, 2, -1) < 0 || !pfd[0].revents)
	{
		fd = accept4(peer.listen, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd >= 0)
		{
			serve_connection(fd);
		}
	}
	return NULL;
}

bool peer_start(const char *path)
{
	peer.addr.sun_family = AF_UNIX;
	strncpy(peer.addr.sun_path, path, sizeof(peer.addr.sun_path) - 1);
	unlink(path);
	peer.stop = eventfd(0, EFD_CLOEXEC);
	peer.listen = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	return peer.stop >= 0 && peer.listen >= 0 &&
		   bind(peer.listen, (struct sockaddr*)&peer.addr, sizeof(peer.addr)) == 0 &&
		   listen(peer.listen, 16) == 0 &&
		   pthread_create(&peer.thread, NULL, run, NULL) == 0;
}

void peer_stop(void)
{
	eventfd_write(peer.stop, 1);
	pthread_join(peer.thread, NULL);
	close(peer.listen);
	close(peer.stop);
	unlink(peer.addr.sun_path);
	while (peer.nheld)
	{
		close(peer.held[--peer.nheld]);
	}
}

void peer_reset(void)
{
	pthread_mutex_lock(&peer.mutex);
	memset(peer.count, 0, sizeof(peer.count));
	memset(peer.confirmed, 0, sizeof(peer.confirmed));
	memset(peer.act, 0, sizeof(peer.act));
	peer.complaint = NULL;
	peer_setup = (struct peer_setup){ .policy = QI_REQUIRED, .key = true };
	pthread_mutex_unlock(&peer.mutex);
}

void peer_script(uint8_t kind, u_int nth, act_t act)
{
	pthread_mutex_lock(&peer.mutex);
	peer.nth[kind] = nth;
	peer.act[kind] = act;
	pthread_mutex_unlock(&peer.mutex);
}

u_int peer_count(uint8_t kind)
{
	u_int n;

	pthread_mutex_lock(&peer.mutex);
	n = peer.count[kind];
	pthread_mutex_unlock(&peer.mutex);
	return n;
}

u_int peer_confirmed(uint8_t kind)
{
	u_int n;

	pthread_mutex_lock(&peer.mutex);
	n = peer.confirmed[kind];
	pthread_mutex_unlock(&peer.mutex);
	return n;
}

bool peer_wait(uint8_t kind, u_int n)
{
	struct timespec end;
	bool there;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += 10;
	pthread_mutex_lock(&peer.mutex);
	while (peer.count[kind] < n &&
		   pthread_cond_timedwait(&peer.changed, &peer.mutex, &end) == 0)
	{
		/* again */
	}
	there = peer.count[kind] >= n;
	pthread_mutex_unlock(&peer.mutex);
	return there;
}

const char *peer_complaint(void)
{
	const char *text;

	pthread_mutex_lock(&peer.mutex);
	text = peer.complaint;
	pthread_mutex_unlock(&peer.mutex);
	return text;
}
