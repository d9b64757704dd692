/* SPDX-License-Identifier: Apache-2.0 */
/* The streams: one request to each instance, by libcurl. Its body has all calls, its response all answers. */
#define _GNU_SOURCE
#include "stream.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <freeDiameter/extension.h>

#define WATCH_MS	500		/* how often an instance that is away is asked whether it is ready */
#define READY_MS	2000		/* how long its answer may take */
#define END_STREAM	2		/* the flag of the last message, which is JSON */
#define MAX_RESPONSE	(1u << 20)	/* several times the size of all answers of a stream */
#define MAX_SOCKETS	(16 * KME_INSTANCES)	/* those of libcurl: of two connections, and of what finds an address */

static CURLM *multi;
static struct curl_slist *headers;
static uint64_t timer_at = UINT64_MAX;	/* when libcurl wants to be called */
static struct pollfd watched[1 + MAX_SOCKETS] = { { .fd = -1, .events = POLLIN } };	/* kme_wake()'s, and sockets */
static CURL *owners[1 + MAX_SOCKETS];	/* the request that each belongs to */
static nfds_t watches = 1;

/* NULL: it is https. */
static const char *socket_path(const char *url)
{
	return strncmp(url, "unix:", 5) ? NULL : url + 5;
}

static int on_timer(CURLM *of, long ms, void *unused)
{
	timer_at = ms < 0 ? UINT64_MAX : kme_now() + (uint64_t)ms;
	return 0;
}

static int on_socket(CURL *of, curl_socket_t fd, int what, void *unused, void *nothing)
{
	nfds_t i;

	for (i = 1; i < watches && watched[i].fd != fd; i++)
		;
	if (what == CURL_POLL_REMOVE) {
		if (i < watches) {
			watched[i] = watched[--watches];
			owners[i] = owners[watches];
		}
		return 0;
	}
	if (i == 1 + MAX_SOCKETS)
		return -1;
	if (i == watches)
		watches++;
	owners[i] = of;
	watched[i] = (struct pollfd){ .fd = fd, .events = (short)((what & CURL_POLL_IN ? POLLIN : 0) |
								  (what & CURL_POLL_OUT ? POLLOUT : 0)) };
	return 0;
}

int stream_start(void)
{
	if (curl_global_init(CURL_GLOBAL_DEFAULT))
		return ENOMEM;
	headers = curl_slist_append(NULL, "Content-Type: application/connect+proto");
	if (headers && !curl_slist_append(headers, "Connect-Protocol-Version: 1"))
		return ENOMEM;
	multi = curl_multi_init();
	if (!headers || !multi)
		return ENOMEM;
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
	watched[0].fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return watched[0].fd < 0 ? errno : 0;
}

void stream_end(void)
{
	curl_multi_cleanup(multi);
	curl_slist_free_all(headers);
	curl_global_cleanup();
}

void kme_wake(void)
{
	const uint64_t one = 1;

	if (write(watched[0].fd, &one, sizeof(one)) < 0)
		return;	/* the counter is full: it wakes anyway */
}

void kme_wake_end(void)
{
	if (watched[0].fd >= 0)
		close(watched[0].fd);
}

/* Sending: libcurl reads the body of the request from here. It does not end. */

/* Puts all calls that are to be sent into a message. */
static void pack(struct instance *i)
{
	size_t size;

	i->out_at = 0;
	i->out_size = PREFIX;
	for (; i->unsent; i->unsent = i->unsent->newer, i->out_size += size) {
		size = KME_CALL - i->unsent->request.from;
		if (i->out_size + size > sizeof(i->out))
			break;
		memcpy(i->out + i->out_size, i->unsent->octets + i->unsent->request.from, size);
	}
	size = i->out_size - PREFIX;
	if (!size)
		i->out_size = 0;
	memcpy(i->out, (const uint8_t[]){ 0, (uint8_t)(size >> 24), (uint8_t)(size >> 16), (uint8_t)(size >> 8),
					  (uint8_t)size }, PREFIX);
}

static size_t give(char *to, size_t one, size_t n, void *instance)
{
	struct instance *i = instance;

	n *= one;
	if (i->out_at == i->out_size)
		pack(i);
	i->paused = i->out_at == i->out_size;
	if (i->paused)
		return CURL_READFUNC_PAUSE;
	if (n > i->out_size - i->out_at)
		n = i->out_size - i->out_at;
	memcpy(to, i->out + i->out_at, n);
	i->out_at += n;
	return n;
}

/* Answers */

/* The last message: {}, or {"error":...}, and with a refusal "metadata":{"Kme-Reason":["..."]}. */
static void take_end(struct instance *i, const uint8_t *data, size_t size)
{
	static const char before[] = "\"Kme-Reason\":[\"";
	char text[1024], *reason;

	if (size >= sizeof(text))
		size = sizeof(text) - 1;
	memcpy(text, data, size);
	text[size] = 0;
	i->course = strstr(text, "\"error\"") ? BROKEN : IN_ORDER;
	if (i->course == IN_ORDER || !(reason = strcasestr(text, before)))
		return;
	reason += sizeof(before) - 1;
	reason[strcspn(reason, "\"")] = 0;
	snprintf(i->refusal, sizeof(i->refusal), "%s", reason);
	i->course = TURNED_AWAY;
}

/* How much of the data are whole messages. SIZE_MAX: it does not come from keysvc. */
static size_t take_messages(struct instance *from, const uint8_t *data, size_t size)
{
	size_t at = 0, length;

	if (from->course != GOES_ON)
		return size;

	while (size - at >= PREFIX) {
		struct wire_in i;

		length = (size_t)data[at + 1] << 24 | (size_t)data[at + 2] << 16 | (size_t)data[at + 3] << 8 | data[at + 4];
		if (data[at] & ~END_STREAM || length > MAX_RESPONSE)
			return SIZE_MAX;
		if (length > size - at - PREFIX)
			break;
		if (data[at] == END_STREAM) {
			take_end(from, data + at + PREFIX, length);
			return size;
		}
		for (i = wire_open(data + at + PREFIX, length); wire_next(&i);)
			if (i.field == ANSWERS && (!i.data || !service_answer(from, i.data, i.size)))
				return SIZE_MAX;
		if (i.broken)
			return SIZE_MAX;
		at += PREFIX + length;
	}
	return at;
}

static size_t take(char *data, size_t one, size_t n, void *instance)
{
	struct instance *i = instance;
	size_t used = 0, need;
	uint8_t *more;

	n *= one;
	i->heard = kme_now();
	if (!i->in_size && (used = take_messages(i, (uint8_t *)data, n)) == SIZE_MAX)
		return CURL_WRITEFUNC_ERROR;
	if (used == n)
		return n;
	need = i->in_size + n - used;
	if (need > i->in_room) {
		if (!(more = realloc(i->in, 2 * need)))
			return CURL_WRITEFUNC_ERROR;
		i->in = more;
		i->in_room = 2 * need;
	}
	memcpy(i->in + i->in_size, data + used, n - used);
	i->in_size = need;
	if ((used = take_messages(i, i->in, i->in_size)) == SIZE_MAX)
		return CURL_WRITEFUNC_ERROR;
	i->in_size -= used;
	memmove(i->in, i->in + used, i->in_size);
	return n;
}

static size_t take_nothing(char *data, size_t one, size_t n, void *unused)
{
	return one * n;
}

/* The stream */

static void end_request(CURL **request)
{
	if (*request) {
		curl_multi_remove_handle(multi, *request);
		curl_easy_cleanup(*request);
	}
	*request = NULL;
}

void stream_close(struct instance *i)
{
	end_request(&i->stream);
	i->paused = i->silent = 0;
	i->course = GOES_ON;
	i->why = NULL;
	i->out_at = i->out_size = i->in_size = 0;
	i->unsent = i->oldest;
}

/*
 * Trusts the CA of this file and no other: by default, libcurl also trusts those in a folder of the system, and
 * may ask the system itself. The file is read for each connection, and not once a day.
 */
static int trust_alone(CURL *h, const char *ca)
{
	CURLcode folder = curl_easy_setopt(h, CURLOPT_CAPATH, NULL);

#if LIBCURL_VERSION_NUM >= 0x075700
	curl_easy_setopt(h, CURLOPT_CA_CACHE_TIMEOUT, 0L);
#endif
	return (folder && folder != CURLE_NOT_BUILT_IN) || curl_easy_setopt(h, CURLOPT_SSL_OPTIONS, 0L) ||
	       !ca || !*ca || curl_easy_setopt(h, CURLOPT_CAINFO, ca);
}

/*
 * A request of an instance, on a connection of its own. It is HTTP/2: negotiated over TLS, and assumed on the socket.
 * NULL: there is no memory.
 */
static CURL *new_request(const struct instance *i, const char *path)
{
	const char *socket = socket_path(i->url);
	char url[320];
	CURL *h = curl_easy_init();

	if (!h)
		return NULL;
	snprintf(url, sizeof(url), "%s/%s", socket ? "http://keysvc" : i->url, path);
	curl_easy_setopt(h, CURLOPT_UNIX_SOCKET_PATH, socket);
	curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, socket ? "http" : "https");
	curl_easy_setopt(h, CURLOPT_HTTP_VERSION, (long)(socket ? CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE :
							 CURL_HTTP_VERSION_2TLS));
	curl_easy_setopt(h, CURLOPT_FRESH_CONNECT, 1L);
	curl_easy_setopt(h, CURLOPT_FORBID_REUSE, 1L);
	curl_easy_setopt(h, CURLOPT_TCP_KEEPALIVE, 1L);
	/* a name's first address gets half of this time if there are more; the default is 300 seconds */
	curl_easy_setopt(h, CURLOPT_CONNECTTIMEOUT_MS, (long)service.timeout_ms);
	curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);	/* no alarm() in the host's process */
	curl_easy_setopt(h, CURLOPT_QUICK_EXIT, 1L);	/* no wait for a name server that hangs */
	curl_easy_setopt(h, CURLOPT_PROXY, "");
	curl_easy_setopt(h, CURLOPT_SSLCERT, service.cert);
	curl_easy_setopt(h, CURLOPT_SSLKEY, service.key);
	if ((!socket && trust_alone(h, service.ca)) || curl_easy_setopt(h, CURLOPT_URL, url)) {
		curl_easy_cleanup(h);
		return NULL;
	}
	return h;
}

/* 0: it was started. */
static int begin_request(CURL *h, CURL **as)
{
	if (!h)
		return ENOMEM;
	if (curl_multi_add_handle(multi, h)) {
		curl_easy_cleanup(h);
		return ENOMEM;
	}
	*as = h;
	return 0;
}

/* Starts the stream of an instance. 0: it was started. */
int stream_open(struct instance *i)
{
	CURL *h = new_request(i, "kme.v1.KeyService/Stream");

	if (h) {
		curl_easy_setopt(h, CURLOPT_HTTPHEADER, headers);
		curl_easy_setopt(h, CURLOPT_POST, 1L);
		curl_easy_setopt(h, CURLOPT_READFUNCTION, give);
		curl_easy_setopt(h, CURLOPT_READDATA, i);
		curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, take);
		curl_easy_setopt(h, CURLOPT_WRITEDATA, i);
	}
	return begin_request(h, &i->stream);
}

/* Asks an instance that is away whether it is ready. */
void stream_watch(struct instance *i)
{
	CURL *h = new_request(i, "readyz");

	if (h) {
		curl_easy_setopt(h, CURLOPT_TIMEOUT_MS, (long)READY_MS);
		curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, take_nothing);
	}
	begin_request(h, &i->watch);
	i->watch_at = kme_now() + WATCH_MS;
}

static void watched_is(struct instance *i, CURLcode result)
{
	long code = 0;

	curl_easy_getinfo(i->watch, CURLINFO_RESPONSE_CODE, &code);
	end_request(&i->watch);
	i->watch_at = kme_now() + WATCH_MS;
	if (!result && code == 200)
		service_ready(i);
}

void stream_unwatch(struct instance *i)
{
	end_request(&i->watch);
}

static void run_timer(void)
{
	int n;

	if (timer_at > kme_now())
		return;
	timer_at = UINT64_MAX;
	curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &n);
}

/* The response has ended, and libcurl waits for nothing more of it. */
static int is_stuck(const struct instance *i)
{
	long code = 0;
	nfds_t n;

	for (n = 1; n < watches; n++)
		if (owners[n] == i->stream)
			return 0;
	return i->stream && !curl_easy_getinfo(i->stream, CURLINFO_RESPONSE_CODE, &code) && code;
}

static void request_ended(CURL *h, CURLcode result)
{
	struct instance *i;

	for (i = instances; i < instances + service.n; i++) {
		if (h == i->watch)
			watched_is(i, result);
		else if (h == i->stream)
			i->why = result == CURLE_WRITE_ERROR ? NO_ANSWER :
				 result ? curl_easy_strerror(result) : "the stream has ended";
	}
}

void streams_turn(uint64_t until)
{
	uint64_t now, woken;
	struct instance *i, *end = instances + service.n;
	CURLMsg *m;
	nfds_t k;
	int n;

	for (i = instances; i < end; i++)
		if (i->paused && i->unsent) {
			i->paused = 0;
			curl_easy_pause(i->stream, CURLPAUSE_CONT);
		}
	run_timer();
	now = kme_now();
	if (service_due() < until)
		until = service_due();
	if (timer_at < until)
		until = timer_at;
	poll(watched, watches, until > now ? (int)(until - now) : 0);
	while (watched[0].revents && read(watched[0].fd, &woken, sizeof(woken)) > 0)
		;
	for (k = watches; --k > 0;) {	/* a socket that is removed is replaced by one that was handled already */
		short e = k < watches ? watched[k].revents : 0;

		watched[k].revents = 0;
		if (e)
			curl_multi_socket_action(multi, watched[k].fd, (e & POLLIN ? CURL_CSELECT_IN : 0) |
						 (e & POLLOUT ? CURL_CSELECT_OUT : 0) |
						 (e & (POLLERR | POLLHUP) ? CURL_CSELECT_ERR : 0), &n);
	}
	run_timer();
	/*
	 * A response that has ended while the request's body has a pause is not told of by libcurl 7.88, Debian 12's:
	 * it only waits for nothing any more. Its end may then be there to be read, or not.
	 */
	for (i = instances; i < end; i++) {
		if (!is_stuck(i))
			continue;
		curl_easy_pause(i->stream, CURLPAUSE_CONT);
		run_timer();
		if (is_stuck(i))
			i->why = "the stream has ended";
	}
	while ((m = curl_multi_info_read(multi, &n)))
		if (m->msg == CURLMSG_DONE)
			request_ended(m->easy_handle, m->data.result);
}
