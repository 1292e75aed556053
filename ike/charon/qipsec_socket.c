/*
 * qipsec: frames, calls with their limits, standing connection.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qipsec.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <threading/thread.h>

/** How long each call may take in all, in ms, times the setting `patience`
 *  (but HELLO, which no IKE_SA waits for). */
static const struct {
	uint8_t kind;
	const char *name;
	u_int ms;
} limits[] = {
	{ QI_HELLO,		"HELLO",	2000 },
	{ QI_GETKEY,	"GETKEY",	600 },
	{ QI_SENT,		"SENT",		300 },
	{ QI_BIND,		"BIND",		600 },
	{ QI_ADD_SA,	"ADD",		200 },
	{ QI_QUERY,		"QUERY",	200 },
	{ QI_UPDATE,	"UPDATE",	200 },
	{ QI_END,		"END",		20 },
	{ QI_IGNORED,	"IGNORED",	20 },
};

/** Pause between attempts to get the standing connection back, in ms. */
#define RETRY_ABSENT 200
#define RETRY_REFUSED 2000

static struct {
	struct sockaddr_un addr;
	uint8_t instance[16];
	/** setting `off`, borrowed; NULL: none */
	const char *off;
	/** setting `patience` */
	u_int patience;
	/** written once to end the thread */
	int stop;
	thread_t *thread;
} this_socket = {
	.stop = -1,
};

#define MS(n) ((uint64_t)(n) * 1000000)

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static void fail(qi_call_t *call, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(call->why, sizeof(call->why), fmt, args);
	va_end(args);
}

static void frame_begin(qi_frame_t *frame, uint8_t kind)
{
	memwipe(frame->b, sizeof(frame->b));
	htoun32(frame->b, QI_MAGIC);
	htoun16(frame->b + 4, QI_ABI);
	frame->b[6] = kind;
	frame->len = QI_HEADER;
	frame->overflow = FALSE;
}

void qi_put(qi_call_t *call, uint16_t tag, const void *value, size_t len)
{
	qi_frame_t *frame = &call->frame;

	if (frame->overflow || len > sizeof(frame->b) - frame->len ||
		sizeof(frame->b) - frame->len - len < 4)
	{
		frame->overflow = TRUE;
		return;
	}
	htoun16(frame->b + frame->len, tag);
	htoun16(frame->b + frame->len + 2, len);
	if (len)
	{
		memcpy(frame->b + frame->len + 4, value, len);
	}
	frame->len += 4 + len;
}

void qi_put_u8(qi_call_t *call, uint16_t tag, uint8_t value)
{
	qi_put(call, tag, &value, sizeof(value));
}

void qi_put_u16(qi_call_t *call, uint16_t tag, uint16_t value)
{
	value = htons(value);
	qi_put(call, tag, &value, sizeof(value));
}

void qi_put_u32(qi_call_t *call, uint16_t tag, uint32_t value)
{
	value = htonl(value);
	qi_put(call, tag, &value, sizeof(value));
}

void qi_put_u64(qi_call_t *call, uint16_t tag, uint64_t value)
{
	value = htobe64(value);
	qi_put(call, tag, &value, sizeof(value));
}

bool qi_get(qi_call_t *call, uint16_t tag, size_t min, size_t max, chunk_t *value)
{
	uint8_t *pos = call->frame.b + QI_HEADER;
	uint8_t *end = call->frame.b + call->frame.len;
	size_t len;

	while (end - pos >= 4)
	{
		len = untoh16(pos + 2);
		if (len > (size_t)(end - pos) - 4)
		{
			break;
		}
		if (untoh16(pos) == tag)
		{
			*value = chunk_create(pos + 4, len);
			return len >= min && len <= max;
		}
		pos += 4 + len;
	}
	return FALSE;
}

bool qi_get_u64(qi_call_t *call, uint16_t tag, uint64_t *value)
{
	chunk_t data;

	if (!qi_get(call, tag, 8, 8, &data))
	{
		return FALSE;
	}
	*value = untoh64(data.ptr);
	return TRUE;
}

void qi_call_init(qi_call_t *call, uint8_t kind)
{
	u_int i, ms = 0;

	for (i = 0; i < countof(limits); i++)
	{
		if (limits[i].kind == kind)
		{
			ms = limits[i].ms * (kind == QI_HELLO ? 1 : this_socket.patience);
			call->name = limits[i].name;
		}
	}
	call->fd = -1;
	call->kind = kind;
	call->why[0] = '\0';
	call->deadline = now() + MS(ms);
	frame_begin(&call->frame, kind);
	qi_put(call, QI_T_INSTANCE, this_socket.instance, sizeof(this_socket.instance));
	qi_put(call, QI_T_VERSION, VERSION, strlen(VERSION));
#ifdef ME
	qi_put_u8(call, QI_T_MEDIATION, 1);
#else
	qi_put_u8(call, QI_T_MEDIATION, 0);
#endif
	qi_put_u64(call, QI_T_DEADLINE, call->deadline);
}

void qi_call_done(qi_call_t *call)
{
	if (call->fd >= 0)
	{
		close(call->fd);
		call->fd = -1;
	}
	memwipe(call->frame.b, sizeof(call->frame.b));
	call->frame.len = 0;
}

/** What is left until the deadline, in ms, rounded up; 0: it is over. */
static int left(qi_call_t *call)
{
	uint64_t t = now();

	return t >= call->deadline ? 0 : (int)((call->deadline - t) / 1000000) + 1;
}

/** Connects and sends the frame. The kernel waits only while qipsecd's queue
 *  of connections is full, and no longer than SO_SNDTIMEO. */
static bool call_open(qi_call_t *call)
{
	struct timeval tv;
	int ms = left(call);

	if (call->frame.overflow)
	{
		fail(call, "the request does not fit a frame of %d bytes", QI_MAX_FRAME);
		return FALSE;
	}
	call->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (call->fd < 0)
	{
		fail(call, "socket: %s", strerror(errno));
		return FALSE;
	}
	tv.tv_sec = ms / 1000;
	tv.tv_usec = (ms % 1000) * 1000 + 1; /* 0 would be for ever */
	if (setsockopt(call->fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) < 0 ||
		connect(call->fd, (struct sockaddr*)&this_socket.addr,
				sizeof(this_socket.addr)) < 0)
	{
		fail(call, "qipsecd not reachable at %s: %s", this_socket.addr.sun_path,
			 strerror(errno));
		return FALSE;
	}
	return TRUE;
}

static bool call_send(qi_call_t *call)
{
	ssize_t n;

	n = send(call->fd, call->frame.b, call->frame.len,
			 MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n != (ssize_t)call->frame.len)
	{
		fail(call, "send to qipsecd: %s", strerror(errno));
		return FALSE;
	}
	return TRUE;
}

/** Reads an answer. The buffer is wiped first. */
static bool call_receive(qi_call_t *call)
{
	struct pollfd pfd = { .fd = call->fd, .events = POLLIN };
	qi_frame_t *frame = &call->frame;
	chunk_t text;
	ssize_t n;
	int ms;

	memwipe(frame->b, sizeof(frame->b));
	frame->len = 0;
	do
	{
		ms = left(call);
		n = ms ? poll(&pfd, 1, ms) : 0;
	}
	while (n < 0 && errno == EINTR);
	if (n <= 0)
	{
		fail(call, "qipsecd gave no answer to %s in time", call->name);
		return FALSE;
	}
	n = recv(call->fd, frame->b, sizeof(frame->b), MSG_DONTWAIT | MSG_TRUNC);
	if (n <= 0)
	{
		fail(call, "qipsecd closed the connection in %s%s%s", call->name,
			 n < 0 ? ": " : "", n < 0 ? strerror(errno) : "");
		return FALSE;
	}
	if (n < QI_HEADER || n > QI_MAX_FRAME ||
		untoh32(frame->b) != QI_MAGIC || frame->b[7])
	{
		fail(call, "what answers %s at %s is not qipsecd", call->name,
			 this_socket.addr.sun_path);
		return FALSE;
	}
	frame->len = n;
	call->kind = frame->b[6];
	if (untoh16(frame->b + 4) != QI_ABI)
	{
		fail(call, "qipsecd speaks ABI %u, this plugin %u: use both of one release",
			 untoh16(frame->b + 4), QI_ABI);
		return FALSE;
	}
	if (call->kind == QI_REFUSE)
	{
		if (qi_get(call, QI_T_TEXT, 1, sizeof(call->why) - 1, &text))
		{
			fail(call, "%.*s", (int)text.len, text.ptr);
		}
		else
		{
			fail(call, "qipsecd refused %s", call->name);
		}
		return FALSE;
	}
	return TRUE;
}

bool qi_call_run(qi_call_t *call)
{
	/* a worker thread that is cancelled here would leave keys and an fd behind */
	bool old = thread_cancelability(FALSE);
	bool good = call_open(call) && call_send(call) && call_receive(call);

	thread_cancelability(old);
	return good;
}

bool qi_call_ok(qi_call_t *call)
{
	if (!qi_call_run(call))
	{
		return FALSE;
	}
	if (call->kind != QI_OK)
	{
		fail(call, "answer %u does not belong to %s", call->kind, call->name);
		return FALSE;
	}
	return TRUE;
}

bool qi_call_next(qi_call_t *call, uint8_t kind)
{
	bool old = thread_cancelability(FALSE), good;

	frame_begin(&call->frame, kind);
	good = call_send(call) && call_receive(call);
	thread_cancelability(old);
	return good;
}

void qi_call_tell(qi_call_t *call)
{
	bool old = thread_cancelability(FALSE);

	if (call_open(call))
	{
		call_send(call);
	}
	thread_cancelability(old);
}

/** Waits until qipsecd closes fd (TRUE) or the plugin is to end; fd -1 and a
 *  limit in ms: waits for that. */
static bool watch(int fd, int ms)
{
	struct pollfd pfd[] = {
		{ .fd = this_socket.stop, .events = POLLIN },
		{ .fd = fd, .events = POLLIN },
	};

	while (poll(pfd, countof(pfd), ms) < 0 && errno == EINTR)
	{
		/* again */
	}
	return !pfd[0].revents;
}

/** Thread: keeps the standing connection. A change of what qipsecd says, or of
 *  its being there, is logged once. */
static void *keep(void *unused)
{
	qi_call_t *call = malloc_thing(qi_call_t);
	char last[sizeof(call->why)] = "";
	bool on = TRUE, there;

	while (on)
	{
		qi_call_init(call, QI_HELLO);
		if (this_socket.off && *this_socket.off)
		{
			qi_put(call, QI_T_OFF, this_socket.off, strlen(this_socket.off));
		}
		there = qi_call_ok(call);
		if (there)
		{
			DBG1(DBG_CFG, "qipsec: qipsecd is there (%s)",
				 this_socket.addr.sun_path);
			on = watch(call->fd, -1);
			if (on)
			{
				DBG1(DBG_CFG, "qipsec: qipsecd is gone: nothing is set up but "
					 "connections that are off");
			}
			last[0] = '\0';
		}
		else
		{
			if (!streq(last, call->why))
			{
				DBG1(DBG_CFG, "qipsec: no qipsecd: %s", call->why);
				strcpy(last, call->why);
			}
			there = call->kind == QI_REFUSE;
			on = watch(-1, there ? RETRY_REFUSED : RETRY_ABSENT);
		}
		qi_call_done(call);
	}
	free(call);
	return NULL;
}

bool qi_socket_start(const char *socket, const char *off, u_int patience)
{
	this_socket.addr.sun_family = AF_UNIX;
	if (strlen(socket) >= sizeof(this_socket.addr.sun_path))
	{
		DBG1(DBG_CFG, "qipsec: socket path '%s' is too long", socket);
		return FALSE;
	}
	strcpy(this_socket.addr.sun_path, socket);
	this_socket.off = off;
	this_socket.patience = patience;
	if (getrandom(this_socket.instance, sizeof(this_socket.instance), 0) !=
		sizeof(this_socket.instance))
	{
		DBG1(DBG_CFG, "qipsec: getrandom: %s", strerror(errno));
		return FALSE;
	}
	this_socket.stop = eventfd(0, EFD_CLOEXEC);
	if (this_socket.stop < 0)
	{
		DBG1(DBG_CFG, "qipsec: eventfd: %s", strerror(errno));
		return FALSE;
	}
	this_socket.thread = thread_create(keep, NULL);
	return this_socket.thread != NULL;
}

void qi_socket_stop(void)
{
	uint64_t one = 1;

	if (this_socket.thread &&
		write(this_socket.stop, &one, sizeof(one)) == sizeof(one))
	{
		this_socket.thread->join(this_socket.thread);
		this_socket.thread = NULL;
	}
	if (this_socket.stop >= 0)
	{
		close(this_socket.stop);
		this_socket.stop = -1;
	}
}
