/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The MME side of S6a for tests: lines of text on a Unix stream socket (its
 * path is the configuration string) become requests, and their answers lines:
 *
 *	AIR id imsi vectors resync|-
 *	ULR id imsi imei payload|- attempt|-
 *	RAW id code flags avps|-
 *
 *	AIA id result control|- attempt|- [rand:xres:autn:kasme]...
 *	ULA id result status|- nw_sig|-
 *	ERR id reason
 *
 * One thread does all work on descriptors. The answers come in threads of the
 * daemon, which only queue a line: they never block, and never see a
 * descriptor.
 */
#define _GNU_SOURCE
#include "dict.h"

#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_SIZE	((256u << 10) + 2)	/* with its CR LF */
#define OUT_MAX		(64u << 20)	/* a reader that far behind is dropped */
#define WORDS_MAX	6
#define TIMEOUT_S	10
#define TABLE_SIZE	4096u		/* a power of two */
#define MESSAGE_MAX	65535u		/* more, and a freeDiameter peer hangs up */
#define MESSAGE_HEADER	20u
#define RAT_EUTRAN	1004u		/* TS 29.212, 5.3.31 */
#define ULR_FLAGS	0x22u		/* S6a indicator, initial attach */

struct text {
	char *data;
	size_t off, len, room;
};

struct conn {
	struct conn *next;
	int fd;			/* -1 when closed; the I/O thread's alone */
	int refs;		/* the list, and each request in flight */
	int open, skipping;
	int broken;		/* to be closed; atomic, any thread may say so */
	struct text in, out;
};

/*
 * A request in flight. The core is given the serial number only and may keep,
 * lose or repeat it at will: a number no longer in the table means nothing.
 */
struct pending {
	struct pending *hash_next;
	struct pending *older, *newer;
	struct conn *conn;
	uint64_t serial, id;
	struct timespec deadline;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct pending *table[TABLE_SIZE];
static struct pending *oldest, *newest;	/* in order of expiry */
static uint64_t last_serial;

static struct conn *conns;
static char *socket_path;
static int listen_fd = -1, wake_fd = -1;
static int stopping;
static pthread_t io_thread;
static int io_started;
static const char *realm;

/* Growing buffers; what is between off and len is still to be used */

static int text_reserve(struct text *t, size_t more)
{
	size_t room = t->room ? t->room : 4096;
	char *data;

	if (t->off) {
		memmove(t->data, t->data + t->off, t->len - t->off);
		t->len -= t->off;
		t->off = 0;
	}
	if (t->room - t->len >= more)
		return 0;
	while (room - t->len < more)
		room *= 2;
	data = realloc(t->data, room);
	if (!data)
		return ENOMEM;
	t->data = data;
	t->room = room;
	return 0;
}

static int text_add(struct text *t, const void *data, size_t size)
{
	if (t->room - t->len < size && text_reserve(t, size))
		return ENOMEM;
	memcpy(t->data + t->len, data, size);
	t->len += size;
	return 0;
}

static int __attribute__((format(printf, 2, 3)))
text_print(struct text *t, const char *format, ...)
{
	char line[128];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (n < 0 || (size_t)n >= sizeof(line))
		return EINVAL;
	return text_add(t, line, n);
}

static int text_hex(struct text *t, const uint8_t *data, size_t size)
{
	static const char digits[] = "0123456789abcdef";
	char pair[2];
	size_t i;

	for (i = 0; i < size; i++) {
		pair[0] = digits[data[i] >> 4];
		pair[1] = digits[data[i] & 15];
		if (text_add(t, pair, 2))
			return ENOMEM;
	}
	return 0;
}

static void conn_break(struct conn *c)
{
	__atomic_store_n(&c->broken, 1, __ATOMIC_RELAXED);
}

static int is_broken(struct conn *c)
{
	return __atomic_load_n(&c->broken, __ATOMIC_RELAXED);
}

/* Connections and requests in flight: all with the lock held */

static void conn_put(struct conn *c)
{
	if (--c->refs)
		return;
	free(c->in.data);
	free(c->out.data);
	free(c);
}

static void conn_say(struct conn *c, const struct text *line)
{
	if (!c->open)
		return;
	if (c->out.len - c->out.off + line->len > OUT_MAX ||
	    text_add(&c->out, line->data, line->len))
		conn_break(c);
}

static struct pending **slot_of(uint64_t serial)
{
	struct pending **p = &table[serial & (TABLE_SIZE - 1)];

	while (*p && (*p)->serial != serial)
		p = &(*p)->hash_next;
	return p;
}

static void pending_link(struct pending *p)
{
	struct pending **slot = &table[p->serial & (TABLE_SIZE - 1)];

	p->hash_next = *slot;
	*slot = p;
	p->older = newest;
	if (newest)
		newest->newer = p;
	else
		oldest = p;
	newest = p;
	p->conn->refs++;
}

static struct pending *pending_take(uint64_t serial)
{
	struct pending **slot = slot_of(serial), *p = *slot;

	if (!p)
		return NULL;
	*slot = p->hash_next;
	if (p->older)
		p->older->newer = p->newer;
	else
		oldest = p->newer;
	if (p->newer)
		p->newer->older = p->older;
	else
		newest = p->older;
	return p;
}

static void pending_free(struct pending *p)
{
	conn_put(p->conn);
	free(p);
}

static void pending_fail(struct pending *p, const char *why)
{
	struct text line = { 0 };

	if (!text_print(&line, "ERR %" PRIu64 " %s\n", p->id, why))
		conn_say(p->conn, &line);
	free(line.data);
	pending_free(p);
}

static void wake(void)
{
	const uint64_t one = 1;

	if (write(wake_fd, &one, sizeof(one)) < 0)
		LOG_E("mme: eventfd: %s", strerror(errno));
}

/* Answers */

static uint32_t result_of(struct msg *msg)
{
	struct avp *group;
	uint32_t code = 0;

	if (u32_of(child(msg, 0, BASE_RESULT_CODE), &code))
		return code;
	group = child(msg, 0, BASE_EXPERIMENTAL_RESULT);
	u32_of(child(group, 0, BASE_EXPERIMENTAL_RESULT_CODE), &code);
	return code;
}

static int say_number(struct text *t, struct avp *avp)
{
	uint32_t number;

	if (!u32_of(avp, &number))
		return text_add(t, " -", 2);
	return text_print(t, " %" PRIu32, number);
}

static int say_hex(struct text *t, const char *before, struct avp *avp)
{
	size_t size;
	const uint8_t *data = octets(avp, &size);

	if (text_add(t, before, strlen(before)))
		return ENOMEM;
	return data && size ? text_hex(t, data, size) : text_add(t, "-", 1);
}

/* One word whatever the octets are */
static int say_word(struct text *t, struct avp *avp)
{
	size_t size, i;
	const uint8_t *data = octets(avp, &size);

	if (!data || !size)
		return text_add(t, " -", 2);
	if (text_add(t, " ", 1))
		return ENOMEM;
	for (i = 0; i < size; i++)
		if (text_add(t, data[i] > ' ' && data[i] < 0x7f ?
			     (const char *)&data[i] : "?", 1))
			return ENOMEM;
	return 0;
}

static int say_vector(struct text *t, struct avp *v)
{
	if (say_hex(t, " ", child(v, VENDOR_3GPP, TGPP_RAND)) ||
	    say_hex(t, ":", child(v, VENDOR_3GPP, TGPP_XRES)) ||
	    say_hex(t, ":", child(v, VENDOR_3GPP, TGPP_AUTN)))
		return ENOMEM;
	return say_hex(t, ":", child(v, VENDOR_3GPP, TGPP_KASME));
}

static int say_aia(struct text *t, uint64_t id, struct msg *msg)
{
	struct avp *v;

	if (text_print(t, "AIA %" PRIu64 " %" PRIu32, id, result_of(msg)) ||
	    say_number(t, child(msg, own_vendor_id, OWN_BINDING_CONTROL)) ||
	    say_word(t, child(msg, own_vendor_id, OWN_BINDING_ATTEMPT)))
		return ENOMEM;
	v = child(msg, VENDOR_3GPP, TGPP_AUTHENTICATION_INFO);
	v = child(v, VENDOR_3GPP, TGPP_EUTRAN_VECTOR);
	for (; v; v = next(v, VENDOR_3GPP, TGPP_EUTRAN_VECTOR))
		if (say_vector(t, v))
			return ENOMEM;
	return 0;
}

static int say_ula(struct text *t, uint64_t id, struct msg *msg)
{
	struct avp *b = child(msg, own_vendor_id, OWN_BINDING_ANSWER);

	if (text_print(t, "ULA %" PRIu64 " %" PRIu32, id, result_of(msg)) ||
	    say_number(t, child(b, own_vendor_id, OWN_BINDING_STATUS)))
		return ENOMEM;
	return say_hex(t, " ", child(b, own_vendor_id, OWN_NW_SIG));
}

static void report(struct pending *p, struct msg *msg)
{
	struct text line = { 0 };
	struct msg_hdr *h;
	int err;

	err = fd_msg_hdr(msg, &h);
	if (!err && h->msg_code == CMD_AIR)
		err = say_aia(&line, p->id, msg);
	else if (!err)
		err = say_ula(&line, p->id, msg);
	if (!err)
		err = text_add(&line, "\n", 1);
	if (err)
		conn_break(p->conn);
	else
		conn_say(p->conn, &line);
	free(line.data);
}

/* The core cancels its threads when it stops: not while we hold the lock */
static void on_answer(void *data, struct msg **msg)
{
	struct pending *p;
	int state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
	pthread_mutex_lock(&lock);
	p = pending_take((uintptr_t)data);
	if (p) {
		report(p, *msg);
		pending_free(p);
	}
	pthread_mutex_unlock(&lock);
	if (p)
		wake();
	fd_msg_free(*msg);
	*msg = NULL;
	pthread_setcancelstate(state, NULL);
}

/* Requests */

static int nibble(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* In place; "-" is no octets at all */
static int unhex(char *word, size_t *size)
{
	uint8_t *out = (uint8_t *)word;
	size_t i, len = strlen(word);

	*size = 0;
	if (!strcmp(word, "-"))
		return 0;
	if (!len || len % 2)
		return EINVAL;
	for (i = 0; i < len; i += 2) {
		int hi = nibble(word[i]), lo = nibble(word[i + 1]);

		if (hi < 0 || lo < 0)
			return EINVAL;
		out[i / 2] = hi << 4 | lo;
	}
	*size = len / 2;
	return 0;
}

static int number(const char *word, int base, uint64_t max, uint64_t *out)
{
	const char *digits = base == 16 ? "0123456789abcdefABCDEF" : "0123456789";
	char *end;

	if (!*word || word[strspn(word, digits)])
		return EINVAL;
	errno = 0;
	*out = strtoull(word, &end, base);
	return errno || *end || *out > max ? EINVAL : 0;
}

static int digits(const char *word, size_t max)
{
	size_t len = strspn(word, "0123456789");

	return len && len <= max && !word[len];
}

static int add_features(struct msg *msg)
{
	struct avp *group;

	CHECK_FCT(add_group(msg, a_supported_features, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, own_vendor_id));
	CHECK_FCT(add_u32(group, a_feature_list_id, 1));
	return add_u32(group, a_feature_list, 1);
}

static int add_routing(struct msg *msg)
{
	CHECK_FCT(fd_msg_new_session(msg, NULL, 0));
	CHECK_FCT(fd_msg_add_origin(msg, 0));
	return add_octets(msg, a_destination_realm, realm, strlen(realm));
}

static int add_common(struct msg *msg, const char *imsi)
{
	static const uint8_t plmn[] = { 0x00, 0xf1, 0x10 };	/* 001 01 */

	CHECK_FCT(add_routing(msg));
	CHECK_FCT(add_u32(msg, a_auth_session_state, 1));
	CHECK_FCT(add_octets(msg, a_user_name, imsi, strlen(imsi)));
	CHECK_FCT(add_features(msg));
	return add_octets(msg, a_visited_plmn_id, plmn, sizeof(plmn));
}

static int fill_air(struct msg *msg, const char *imsi, uint32_t vectors,
		    const char *resync, size_t resync_size)
{
	struct avp *group;

	CHECK_FCT(add_common(msg, imsi));
	CHECK_FCT(add_group(msg, a_requested_eutran, &group));
	CHECK_FCT(add_u32(group, a_number_of_vectors, vectors));
	if (!resync_size)
		return 0;
	return add_octets(group, a_resync_info, resync, resync_size);
}

static int add_terminal(struct msg *msg, const char *imei)
{
	struct avp *group;

	CHECK_FCT(add_group(msg, a_terminal_information, &group));
	CHECK_FCT(add_octets(group, a_imei, imei, strlen(imei)));
	return add_octets(group, a_software_version, "01", 2);
}

static int add_binding(struct msg *msg, const char *payload, size_t size,
		       const char *attempt)
{
	struct avp *group;

	CHECK_FCT(add_group(msg, a_binding_request, &group));
	CHECK_FCT(add_octets(group, a_binding_payload, payload, size));
	if (!strcmp(attempt, "-"))
		return 0;
	return add_octets(group, a_binding_attempt, attempt, strlen(attempt));
}

static int fill_ulr(struct msg *msg, const char *imsi, const char *imei,
		    const char *payload, size_t size, const char *attempt)
{
	CHECK_FCT(add_common(msg, imsi));
	CHECK_FCT(add_u32(msg, a_rat_type, RAT_EUTRAN));
	CHECK_FCT(add_u32(msg, a_ulr_flags, ULR_FLAGS));
	CHECK_FCT(add_terminal(msg, imei));
	if (!size)
		return 0;
	return add_binding(msg, payload, size, attempt);
}

/*
 * The library reads and writes back a list of AVPs by these lengths without
 * looking inside them, and is not safe against lengths below a header's.
 */
static int raw_list_ok(const uint8_t *p, size_t size)
{
	while (size) {
		size_t head, len;

		if (size < 8)
			return 0;
		head = p[4] & AVP_FLAG_VENDOR ? 12 : 8;
		len = (size_t)p[5] << 16 | (size_t)p[6] << 8 | p[7];
		if (len < head || len > size)
			return 0;
		len = (len + 3) & ~(size_t)3;
		if (len >= size)
			return 1;
		p += len;
		size -= len;
	}
	return 1;
}

static void put_length(uint8_t *message, size_t size)
{
	message[1] = size >> 16;
	message[2] = size >> 8;
	message[3] = size;
}

/* Makes *msg anew from its octets and the raw ones: those stay unparsed */
static int append_raw(struct msg **msg, const char *raw, size_t size)
{
	size_t head, total;
	uint8_t *buf = NULL, *more;
	struct msg *joined;

	CHECK_FCT(fd_msg_bufferize(*msg, &buf, &head));
	total = head + ((size + 3) & ~(size_t)3);
	more = realloc(buf, total);
	if (!more) {
		free(buf);
		return ENOMEM;
	}
	buf = more;
	memset(buf + head, 0, total - head);
	memcpy(buf + head, raw, size);
	put_length(buf, total);
	if (fd_msg_parse_buffer(&buf, total, &joined)) {
		free(buf);
		return EBADMSG;
	}
	fd_msg_free(*msg);
	*msg = joined;
	return 0;
}

static int fill_raw(struct msg **msg, uint8_t flags, const char *raw,
		    size_t size)
{
	struct msg_hdr *h;

	CHECK_FCT(add_routing(*msg));
	CHECK_FCT(fd_msg_hdr(*msg, &h));
	h->msg_flags = flags;
	return append_raw(msg, raw, size);
}

/* Sending */

/*
 * fd_msg_send() posts to a queue that blocks when full and, when the core
 * stops, is destroyed after the last peer has gone. So: only with a peer open
 * and room in the queue.
 */
static int peer_open(void)
{
	struct fd_list *li;
	int open = 0;

	if (pthread_rwlock_rdlock(&fd_g_peers_rw))
		return 0;
	for (li = fd_g_peers.next; li != &fd_g_peers && !open; li = li->next)
		open = fd_peer_get_state(li->o) == STATE_OPEN;
	pthread_rwlock_unlock(&fd_g_peers_rw);
	return open;
}

static int queue_room(void)
{
	int count = 0, limit = 0;

	if (fd_stat_getstats(STAT_G_OUTGOING, NULL, &count, &limit, NULL, NULL,
			     NULL, NULL, NULL))
		return 0;
	return !limit || count < limit / 2;
}

static void say_error(struct conn *c, uint64_t id, const char *why)
{
	struct text line = { 0 };

	pthread_mutex_lock(&lock);
	if (!text_print(&line, "ERR %" PRIu64 " %s\n", id, why))
		conn_say(c, &line);
	pthread_mutex_unlock(&lock);
	free(line.data);
}

static struct pending *pending_new(struct conn *c, uint64_t id)
{
	struct pending *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	p->conn = c;
	p->id = id;
	clock_gettime(CLOCK_MONOTONIC, &p->deadline);
	p->deadline.tv_sec += TIMEOUT_S;
	pthread_mutex_lock(&lock);
	p->serial = ++last_serial;
	pending_link(p);
	pthread_mutex_unlock(&lock);
	return p;
}

static const char *too_long(struct msg *msg)
{
	struct msg_hdr *h;

	if (fd_msg_update_length(msg) || fd_msg_hdr(msg, &h))
		return "cannot-build";
	return h->msg_length > MESSAGE_MAX ? "too-long" : NULL;
}

/*
 * Not fd_msg_send_timeout(): version 1.2.1 then starts a thread for each peer,
 * and when the core stops under load it can destroy what that thread waits on
 * and hang. The time-out is ours alone; the core keeps an unanswered request
 * for as long as its peer is connected.
 *
 * The answer may be here before fd_msg_send() returns: p is not ours any more
 * from there on, the serial number is.
 */
static const char *post(struct conn *c, uint64_t id, struct msg **msg)
{
	struct pending *p = pending_new(c, id);
	uint64_t serial;
	int err;

	if (!p)
		return "no-memory";
	serial = p->serial;
	err = fd_msg_send(msg, on_answer, (void *)(uintptr_t)serial);
	if (!err)
		return NULL;
	pthread_mutex_lock(&lock);
	p = pending_take(serial);
	if (p)
		pending_free(p);
	pthread_mutex_unlock(&lock);
	return p ? "cannot-send" : NULL;
}

static void submit(struct conn *c, uint64_t id, struct msg **msg, int err)
{
	const char *why = err ? "cannot-build" : too_long(*msg);

	if (!why)
		why = peer_open() ? post(c, id, msg) : "no-peer";
	if (*msg)
		fd_msg_free(*msg);
	*msg = NULL;
	if (why)
		say_error(c, id, why);
}

static int new_request(struct dict_object *model, struct msg **msg)
{
	*msg = NULL;
	return fd_msg_new(model, MSGFL_ALLOC_ETEID, msg);
}

/* Lines: EINVAL means malformed */

static int do_air(struct conn *c, uint64_t id, char **w)
{
	struct msg *msg;
	uint64_t vectors;
	size_t size;
	int err;

	if (!digits(w[2], 15) || number(w[3], 10, UINT32_MAX, &vectors) ||
	    unhex(w[4], &size))
		return EINVAL;
	err = new_request(d_air, &msg);
	if (!err)
		err = fill_air(msg, w[2], vectors, w[4], size);
	submit(c, id, &msg, err);
	return 0;
}

static int do_ulr(struct conn *c, uint64_t id, char **w)
{
	struct msg *msg;
	size_t size;
	int err;

	if (!digits(w[2], 15) || !digits(w[3], 16) || unhex(w[4], &size))
		return EINVAL;
	err = new_request(d_ulr, &msg);
	if (!err)
		err = fill_ulr(msg, w[2], w[3], w[4], size, w[5]);
	submit(c, id, &msg, err);
	return 0;
}

static int do_raw(struct conn *c, uint64_t id, char **w)
{
	struct msg *msg;
	uint64_t code, flags;
	size_t size;
	int err;

	if (number(w[2], 10, UINT32_MAX, &code) ||
	    number(w[3], 16, 0xff, &flags) || unhex(w[4], &size))
		return EINVAL;
	if (code != CMD_AIR && code != CMD_ULR) {
		say_error(c, id, "bad-code");
		return 0;
	}
	if (!(flags & CMD_FLAG_REQUEST)) {
		say_error(c, id, "bad-flags");
		return 0;
	}
	if (!raw_list_ok((uint8_t *)w[4], size)) {
		say_error(c, id, "bad-avps");
		return 0;
	}
	err = new_request(code == CMD_AIR ? d_air : d_ulr, &msg);
	if (!err)
		err = fill_raw(&msg, flags, w[4], size);
	submit(c, id, &msg, err);
	return 0;
}

static const struct verb {
	const char *name;
	int words;
	int (*run)(struct conn *c, uint64_t id, char **w);
} verbs[] = {
	{ "AIR", 5, do_air },
	{ "ULR", 6, do_ulr },
	{ "RAW", 5, do_raw },
};

/* -1: more words than any verb has */
static int split(char *line, char **w)
{
	int n = 0;

	while (line) {
		if (n == WORDS_MAX)
			return -1;
		w[n] = strsep(&line, " ");
		if (!*w[n])
			return -1;
		n++;
	}
	return n;
}

static int do_words(struct conn *c, char **w, int n)
{
	uint64_t id;
	size_t i;

	if (n < 2 || number(w[1], 10, UINT64_MAX, &id))
		return EINVAL;
	for (i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
		if (!strcmp(w[0], verbs[i].name) && n == verbs[i].words)
			return verbs[i].run(c, id, w);
	return EINVAL;
}

static void do_line(struct conn *c, char *line, size_t len)
{
	char *w[WORDS_MAX];

	if (len && line[len - 1] == '\r')
		line[--len] = 0;
	if (strlen(line) != len || do_words(c, w, split(line, w)))
		say_error(c, 0, "malformed");
}

/* I/O thread */

/* 1 if a line was there */
static int one_line(struct conn *c)
{
	char *line = c->in.data + c->in.off, *end;
	size_t len = c->in.len - c->in.off;

	if (is_broken(c) || !len)
		return 0;
	end = memchr(line, '\n', len);
	if (!end) {
		if (len < LINE_MAX_SIZE)
			return 0;
		c->skipping = 1;
		c->in.off = c->in.len;
		return 0;
	}
	*end = 0;
	c->in.off += end - line + 1;
	if (c->skipping)
		say_error(c, 0, "malformed");
	else
		do_line(c, line, end - line);
	c->skipping = 0;
	return 1;
}

/* A line of each in turn. 1 if it had to stop for lack of room in the core */
static int do_lines(void)
{
	struct conn *c;
	int some = 1;

	while (some) {
		some = 0;
		for (c = conns; c; c = c->next) {
			if (peer_open() && !queue_room())
				return 1;
			some |= one_line(c);
		}
	}
	return 0;
}

static void conn_read(struct conn *c)
{
	size_t held = c->in.len - c->in.off;
	ssize_t n;

	if (held >= LINE_MAX_SIZE)
		return;
	if (text_reserve(&c->in, LINE_MAX_SIZE - held)) {
		conn_break(c);
		return;
	}
	n = read(c->fd, c->in.data + c->in.len, LINE_MAX_SIZE - held);
	if (n > 0)
		c->in.len += n;
	else if (!n || (errno != EAGAIN && errno != EINTR))
		conn_break(c);
}

/* Takes the queued octets out, for send() without the lock */
static struct text out_take(struct conn *c)
{
	struct text t;

	pthread_mutex_lock(&lock);
	t = c->out;
	memset(&c->out, 0, sizeof(c->out));
	pthread_mutex_unlock(&lock);
	return t;
}

/* Puts what was not sent back, before what came in the meantime */
static void out_return(struct conn *c, struct text *t)
{
	pthread_mutex_lock(&lock);
	if (t->off < t->len) {
		if (c->out.len && text_add(t, c->out.data + c->out.off,
					   c->out.len - c->out.off))
			conn_break(c);
		free(c->out.data);
		c->out = *t;
	} else {
		free(t->data);
	}
	pthread_mutex_unlock(&lock);
}

static void conn_write(struct conn *c)
{
	struct text t = out_take(c);
	int broken = 0;

	while (t.off < t.len) {
		ssize_t n = send(c->fd, t.data + t.off, t.len - t.off,
				 MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0) {
			broken = errno != EAGAIN && errno != EINTR;
			break;
		}
		t.off += n;
	}
	out_return(c, &t);
	if (broken)
		conn_break(c);
}

static void conn_accept(void)
{
	int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct conn *c;

	if (fd < 0) {
		if (errno == EMFILE || errno == ENFILE)
			usleep(10000);	/* or poll() would spin */
		return;
	}
	c = calloc(1, sizeof(*c));
	if (!c) {
		close(fd);
		return;
	}
	c->fd = fd;
	c->refs = 1;
	c->open = 1;
	c->next = conns;
	conns = c;
}

static void conn_close(struct conn *c)
{
	close(c->fd);
	pthread_mutex_lock(&lock);
	c->fd = -1;
	c->open = 0;
	conn_put(c);
	pthread_mutex_unlock(&lock);
}

static void close_broken(int all)
{
	struct conn **p = &conns, *c;

	while ((c = *p)) {
		if (!all && !is_broken(c)) {
			p = &c->next;
			continue;
		}
		*p = c->next;
		conn_close(c);
	}
}

/* Milliseconds to the next time-out, rounded up; -1 if none */
static int expire(void)
{
	struct timespec now;
	int64_t left = -1;

	clock_gettime(CLOCK_MONOTONIC, &now);
	pthread_mutex_lock(&lock);
	while (oldest) {
		left = (oldest->deadline.tv_sec - now.tv_sec) * 1000000000ll +
		       oldest->deadline.tv_nsec - now.tv_nsec;
		if (left > 0)
			break;
		pending_fail(pending_take(oldest->serial), "timeout");
		left = -1;
	}
	pthread_mutex_unlock(&lock);
	return left < 0 ? -1 : (int)((left + 999999) / 1000000);
}

static size_t count_conns(void)
{
	struct conn *c;
	size_t n = 0;

	for (c = conns; c; c = c->next)
		n++;
	return n;
}

static short wanted_events(struct conn *c)
{
	short events = 0;

	if (c->in.len - c->in.off < LINE_MAX_SIZE)
		events |= POLLIN;
	pthread_mutex_lock(&lock);
	if (c->out.off < c->out.len)
		events |= POLLOUT;
	pthread_mutex_unlock(&lock);
	return events;
}

static struct pollfd *fill_poll(struct pollfd *fds, size_t count)
{
	struct conn *c;
	size_t i = 2;

	fds = realloc(fds, count * sizeof(*fds));
	if (!fds)
		return NULL;
	fds[0] = (struct pollfd){ .fd = wake_fd, .events = POLLIN };
	fds[1] = (struct pollfd){ .fd = listen_fd, .events = POLLIN };
	for (c = conns; c; c = c->next)
		fds[i++] = (struct pollfd){ .fd = c->fd,
					    .events = wanted_events(c) };
	return fds;
}

static void serve(struct pollfd *fds)
{
	struct conn *c;
	uint64_t woken;
	size_t i = 2;

	if (fds[0].revents && read(wake_fd, &woken, sizeof(woken)) < 0)
		LOG_E("mme: eventfd: %s", strerror(errno));
	for (c = conns; c; c = c->next, i++) {
		if (fds[i].revents & POLLOUT)
			conn_write(c);
		if (fds[i].revents & (POLLIN | POLLHUP | POLLERR))
			conn_read(c);
		/* a hang-up is final even where we did not ask to read */
		if (fds[i].revents & POLLHUP && !(fds[i].revents & POLLIN))
			conn_break(c);
	}
	if (fds[1].revents)
		conn_accept();
}

static void *io_main(void *arg)
{
	struct pollfd *fds = NULL, *more;

	fd_log_threadname("mme bridge");
	while (!__atomic_load_n(&stopping, __ATOMIC_ACQUIRE)) {
		int stalled = do_lines();
		int wait = expire();

		close_broken(0);
		more = fill_poll(fds, count_conns() + 2);
		if (!more)
			break;
		fds = more;
		if (stalled)
			wait = 1;	/* nothing tells when the queue has room */
		if (poll(fds, count_conns() + 2, wait) > 0)
			serve(fds);
	}
	free(fds);
	close_broken(1);
	return NULL;
}

/* Start and end */

static int socket_bind(int fd, const char *path)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };

	if (strlen(path) >= sizeof(sa.sun_path))
		return ENAMETOOLONG;
	strcpy(sa.sun_path, path);
	if (unlink(path) && errno != ENOENT)
		return errno;
	/* Linux gives the name this mode: never open to others, even briefly */
	if (fchmod(fd, 0600) || bind(fd, (struct sockaddr *)&sa, sizeof(sa)))
		return errno;
	socket_path = strdup(path);
	if (!socket_path || chmod(path, 0600) || listen(fd, 64))
		return errno;
	return 0;
}

static int socket_open(const char *path)
{
	int err;

	listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
			   0);
	if (listen_fd < 0)
		return errno;
	err = socket_bind(listen_fd, path);
	if (err)
		LOG_E("mme: %s: %s", path, strerror(err));
	return err;
}

static int mme_entry(char *conf)
{
	if (!conf || !*conf) {
		LOG_E("mme: the configuration string must be a socket path");
		return EINVAL;
	}
	realm = getenv("KME_TEST_REALM");
	if (!realm || !*realm)
		realm = "hss.test";
	CHECK_FCT(s6a_dict(VENDOR_OWN));
	CHECK_FCT(fd_disp_app_support(d_app, d_3gpp, 1, 0));
	wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (wake_fd < 0)
		return errno;
	CHECK_FCT(socket_open(conf));
	CHECK_POSIX(pthread_create(&io_thread, NULL, io_main, NULL));
	io_started = 1;
	return 0;
}

/* The core's threads are gone by now: no callback comes any more */
void fd_ext_fini(void)
{
	__atomic_store_n(&stopping, 1, __ATOMIC_RELEASE);
	if (io_started) {
		wake();
		pthread_join(io_thread, NULL);
	}
	while (oldest)
		pending_free(pending_take(oldest->serial));
	if (listen_fd >= 0)
		close(listen_fd);
	if (wake_fd >= 0)
		close(wake_fd);
	if (socket_path)
		unlink(socket_path);
	free(socket_path);
}

EXTENSION_ENTRY("mme", mme_entry);
