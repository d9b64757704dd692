/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The MME side of S6a for tests: lines of text on a Unix stream socket (its path is the configuration string) become
 * requests, and their answers lines; see mme_lines.c.
 *
 * One thread does all work on descriptors. The answers come in threads of the daemon, which only queue a line: they
 * never block, and never see a descriptor: see mme_sent.c.
 */
#define _GNU_SOURCE
#include "mme.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define LINE_MAX_SIZE	((256u << 10) + 2)	/* with its CR LF */
#define WORDS_MAX	16

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

int text_add(struct text *t, const void *data, size_t size)
{
	if (t->room - t->len < size && text_reserve(t, size))
		return ENOMEM;
	memcpy(t->data + t->len, data, size);
	t->len += size;
	return 0;
}

int text_print(struct text *t, const char *format, ...)
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

void conn_break(struct conn *c)
{
	__atomic_store_n(&c->broken, 1, __ATOMIC_RELAXED);
}

static int is_broken(struct conn *c)
{
	return __atomic_load_n(&c->broken, __ATOMIC_RELAXED);
}

void wake(void)
{
	const uint64_t one = 1;

	if (write(wake_fd, &one, sizeof(one)) < 0)
		LOG_E("mme: eventfd: %s", strerror(errno));
}

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

static void do_line(struct conn *c, char *line, size_t len)
{
	char *w[WORDS_MAX], *end = NULL;
	struct msg *msg = NULL;
	uint64_t id = 0;
	const char *why = "malformed";
	int n;

	if (len && line[len - 1] == '\r')
		line[--len] = 0;
	n = strlen(line) == len ? split(line, w) : -1;
	if (n >= 2 && *w[1] && !w[1][strspn(w[1], "0123456789")])
		id = strtoull(w[1], &end, 10);
	if (end)
		why = mme_request(w, n, realm, &msg);
	submit(c, why && !strcmp(why, "malformed") ? 0 : id, &msg, why);
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
	int app;

	if (!conf || !*conf) {
		LOG_E("mme: the configuration string must be a socket path");
		return EINVAL;
	}
	realm = getenv("KME_TEST_REALM");
	if (!realm || !*realm)
		realm = "hss.test";
	CHECK_FCT(tgpp_dictionary(0));
	for (app = S6A; app < APPS; app++)
		CHECK_FCT(fd_disp_app_support(tgpp_apps[app], tgpp_vendor, 1, 0));
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
	end_requests();
	if (listen_fd >= 0)
		close(listen_fd);
	if (wake_fd >= 0)
		close(wake_fd);
	if (socket_path)
		unlink(socket_path);
	free(socket_path);
}

EXTENSION_ENTRY("mme", mme_entry);
