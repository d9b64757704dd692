/* SPDX-License-Identifier: Apache-2.0 */
/* The requests in flight, and their answers, which come in threads of the daemon. */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mme.h"

#define OUT_MAX		(64u << 20)	/* a reader that far behind is dropped */
#define TIMEOUT_S	30
#define TABLE_SIZE	4096u		/* a power of two */
#define MESSAGE_MAX	65535u		/* more, and a freeDiameter peer hangs up */

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

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct pending *table[TABLE_SIZE];
static struct pending *oldest, *newest;	/* in order of expiry */
static uint64_t last_serial;

/* Connections and requests in flight: all with the lock held */

void conn_put(struct conn *c)
{
	if (--c->refs)
		return;
	free(c->in.data);
	free(c->out.data);
	free(c);
}

void conn_say(struct conn *c, const struct text *line)
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

/* Answers */

static void report(struct pending *p, struct msg *msg)
{
	struct text line = { 0 };
	char id[24];

	snprintf(id, sizeof(id), "%" PRIu64, p->id);
	if (mme_answer(&line, id, msg) || text_add(&line, "\n", 1))
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

/* Sending */

/*
 * fd_msg_send() posts to a queue that blocks when full and, when the core
 * stops, is destroyed after the last peer has gone. So: only with a peer open
 * and room in the queue.
 */
int peer_open(void)
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

int queue_room(void)
{
	int count = 0, limit = 0;

	if (fd_stat_getstats(STAT_G_OUTGOING, NULL, &count, &limit, NULL, NULL,
			     NULL, NULL, NULL))
		return 0;
	return !limit || count < limit / 2;
}

void say_error(struct conn *c, uint64_t id, const char *why)
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

void submit(struct conn *c, uint64_t id, struct msg **msg, const char *why)
{
	if (!why)
		why = too_long(*msg);

	if (!why)
		why = peer_open() ? post(c, id, msg) : "no-peer";
	if (*msg)
		fd_msg_free(*msg);
	if (why)
		say_error(c, id, why);
}

/* Milliseconds to the next time-out, rounded up; -1 if none */
int expire(void)
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

void end_requests(void)
{
	while (oldest)
		pending_free(pending_take(oldest->serial));
}
