/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "service.h"

#include <curl/curl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <freeDiameter/extension.h>

#define MAX_PAYLOAD	512		/* a lot of 4096 bits */
#define RETRY_MS	1000		/* how long nobody is asked before one call tries again */
#define PREFIX		5		/* of a message (connectrpc.com/docs/protocol): flags, and its length */
#define END_STREAM	2		/* the flag of the last message, which is JSON */
#define MAX_REQUEST	60000		/* of a message; the service takes 64 KiB */
#define MAX_RESPONSE	(1u << 20)	/* several times what all answers of a stream are */
#define MAX_SOCKETS	16		/* those of libcurl: of one connection, and of what finds its address */
#define NO_ANSWER	"no answer of this service"

static const char *const methods[] = {
	"PrepareVector", "EstablishKME", "ReportAuthentication", "RestoreRAND", "GetBinding",
	"CheckEquipment",
};

/* Fields of kme.proto. */
enum { CALLS = 1, ANSWERS = 1, CALL_ID = 1, CALL_TIMEOUT = 2, ANSWER_ID = 1, ANSWER_ERROR = 2, ERROR_REASON = 2 };
enum { FIRST_METHOD = 3 };	/* of Call and of Answer: the methods follow in the order of enum kme_method */

static struct kme_service service;
static CURLM *multi;
static struct curl_slist *headers;
static CURL *stream;			/* NULL: there is none */
static int paused;			/* it has nothing to send */
static enum { GOES_ON, IN_ORDER, BROKEN, TURNED_AWAY } course;	/* how it has ended, if it has */
static char refusal[KME_REASON + 1];
static uint64_t timer_at = UINT64_MAX;	/* when libcurl wants to be called */
static struct pollfd watched[1 + MAX_SOCKETS] = { { .fd = -1, .events = POLLIN } };	/* who wakes us, and sockets */
static nfds_t watches = 1;
static struct kme_call **by_id;		/* those under way, at id % service.calls */
static struct kme_call *oldest, *newest;	/* under way, in the order of their deadlines */
static struct kme_call *unsent;		/* the first of them that the stream has not been given, with all newer ones */
static struct kme_call *ended, *last_ended;	/* to be done */
static long under_way;
static uint64_t last_id;
static uint8_t out[PREFIX + MAX_REQUEST];	/* the message that is being sent */
static size_t out_at, out_size;
static uint8_t *in;			/* what has come of messages that are not whole */
static size_t in_size, in_room;
static long failures;			/* in a row; service.breaker of them open the circuit breaker */
static uint64_t retry_at;		/* while it is open */

uint64_t kme_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* NULL: it is https. */
static const char *socket_path(void)
{
	return strncmp(service.url, "unix:", 5) ? NULL : service.url + 5;
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
		if (i < watches)
			watched[i] = watched[--watches];
		return 0;
	}
	if (i == 1 + MAX_SOCKETS)
		return -1;
	if (i == watches)
		watches++;
	watched[i] = (struct pollfd){ .fd = fd, .events = (short)((what & CURL_POLL_IN ? POLLIN : 0) |
								  (what & CURL_POLL_OUT ? POLLOUT : 0)) };
	return 0;
}

int kme_service_start(const struct kme_service *of)
{
	service = *of;
	if (curl_global_init(CURL_GLOBAL_DEFAULT))
		return ENOMEM;
	headers = curl_slist_append(NULL, "Content-Type: application/connect+proto");
	if (headers && !curl_slist_append(headers, "Connect-Protocol-Version: 1"))
		return ENOMEM;
	by_id = calloc((size_t)service.calls, sizeof(*by_id));
	multi = curl_multi_init();
	if (!headers || !by_id || !multi)
		return ENOMEM;
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
	watched[0].fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return watched[0].fd < 0 ? errno : 0;
}

void kme_wake(void)
{
	const uint64_t one = 1;

	if (write(watched[0].fd, &one, sizeof(one)) < 0)
		return;	/* it has been woken so often that it wakes anyway */
}

static int only(const char *s, const char *allowed, size_t least, size_t most)
{
	size_t n = strnlen(s, most + 1);

	return n >= least && n <= most && strspn(s, allowed) == n;
}

static int is_digits(const char *s)
{
	return only(s, "0123456789", 6, 16);
}

static int is_attempt(const char *s)
{
	return only(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", 1, KME_ATTEMPT);
}

static void reply_is(struct kme_reply *r, enum kme_status status, const char *reason)
{
	memset(r, 0, sizeof(*r));
	r->status = status;
	snprintf(r->reason, sizeof(r->reason), "%s", reason);
}

void kme_parse_error(const char *reason, size_t size, struct kme_reply *out)
{
	char said[KME_REASON + 1] = "";

	static const struct {
		const char *reason;
		enum kme_status status;
	} known[] = {
		{ "NO_ATTEMPT", KME_NO_ATTEMPT }, { "NOT_BOUND", KME_NOT_BOUND },
		{ "CALLER_NOT_ALLOWED", KME_NOT_ALLOWED }, { "MALFORMED", KME_REFUSED },
		{ "UNKNOWN_DEVICE", KME_REFUSED }, { "REVOKED_DEVICE", KME_REFUSED },
		{ "OTHER_DEVICE", KME_REFUSED }, { "KME_REJECTED", KME_REFUSED },
		/* Not as if keysvc were away: whoever has its database could have an open range served so. */
		{ "DAMAGED", KME_REFUSED }, { "ROLLED_BACK", KME_REFUSED },
	};
	size_t i;

	if (size <= KME_REASON)
		memcpy(said, reason, size);
	if (!only(said, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_", 1, KME_REASON) || strlen(said) != size)
		strcpy(said, "no Kme-Reason");
	reply_is(out, KME_UNAVAILABLE, said);	/* also what nobody understands */
	for (i = 0; i < sizeof(known) / sizeof(*known); i++)
		if (!strcmp(said, known[i].reason))
			out->status = known[i].status;
}

static int exactly(const struct wire_in *i, uint8_t *to, size_t size)
{
	if (!i->data || i->size != size)
		return 0;
	memcpy(to, i->data, size);
	return 1;
}

/* Only with PROVISIONING_ONLY there is an attempt. */
static int parse_prepared(struct wire_in *i, size_t asked, struct kme_reply *out)
{
	size_t rands = 0;

	while (wire_next(i))
		switch (i->field) {
		case 1:
			if (rands == asked || !exactly(i, out->rands[rands++], KME_RAND))
				return 0;
			break;
		case 2:
			out->control = (enum kme_control)i->number;
			break;
		case 3:
			if (!i->data || i->size > KME_ATTEMPT)
				return 0;
			memcpy(out->attempt, i->data, i->size);
			out->attempt[i->size] = 0;
			break;
		}
	return rands == asked && (out->control == KME_PREPROCESSED ? !*out->attempt :
				  out->control == KME_PROVISIONING_ONLY && is_attempt(out->attempt));
}

static int parse_reported(struct wire_in *i, struct kme_reply *out)
{
	while (wire_next(i))
		if (i->field == 2)
			out->control = (enum kme_control)i->number;
	return out->control == KME_PREPROCESSED || out->control == KME_PROVISIONING_ONLY;
}

/* The one field that counts, of exactly this size. */
static int parse_octets(struct wire_in *i, uint8_t *to, size_t size)
{
	int there = 0;

	while (wire_next(i))
		if (i->field == 1 && !(there = exactly(i, to, size)))
			return 0;
	return there;
}

static int parse_binding(struct wire_in *i, struct kme_reply *out)
{
	enum { PENDING = 1, ACTIVE, REVOKED };
	uint64_t state = 0;

	while (wire_next(i))
		if (i->field == 5)
			state = i->number;
	out->bound = state == PENDING || state == ACTIVE;
	return out->bound || state == REVOKED;
}

static int parse_equipment(struct wire_in *i, struct kme_reply *out)
{
	uint64_t status = 0;

	while (wire_next(i))
		if (i->field == 1)
			status = i->number;
	out->equipment = (enum kme_equipment)status;
	return status >= KME_WHITELISTED && status <= KME_BLACKLISTED;
}

void kme_parse(enum kme_method method, const void *response, size_t size, size_t asked, struct kme_reply *out)
{
	struct wire_in i = wire_open(response, size);
	int ok = 0;

	reply_is(out, KME_OK, "");
	switch (method) {
	case KME_PREPARE:
		ok = asked <= KME_RANDS && parse_prepared(&i, asked, out);
		break;
	case KME_ESTABLISH:
		ok = parse_octets(&i, out->nw_sig, KME_NW_SIG);
		break;
	case KME_REPORT:
		ok = parse_reported(&i, out);
		break;
	case KME_RESTORE:
		ok = parse_octets(&i, out->rands[0], KME_RAND);
		break;
	case KME_BINDING:
		ok = parse_binding(&i, out);
		break;
	case KME_EQUIPMENT:
		ok = parse_equipment(&i, out);
		break;
	}
	if (!ok || i.broken)
		reply_is(out, KME_UNAVAILABLE, NO_ANSWER);
}

/* Whether it is well asked: then its fields are to be written, the last one first. */
static int asks(struct kme_call *c, enum kme_method method, int well)
{
	c->method = method;
	c->once = 0;
	c->request = (struct wire_out){ .data = well ? c->octets : NULL, .from = KME_CALL, .end = KME_CALL };
	reply_is(&c->reply, well ? KME_UNAVAILABLE : KME_REFUSED, well ? "not asked" : "MALFORMED");
	return well;
}

void kme_ask_prepare(struct kme_call *c, const char *imsi, const char *origin, uint8_t *const *rands, size_t n,
		     int no_provisioning)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_PREPARE, is_digits(imsi) && n && n <= KME_RANDS))
		return;
	wire_number(o, 4, (uint64_t)no_provisioning);
	wire_text(o, 3, origin);
	for (c->asked = n; n; n--)
		wire_bytes(o, 2, rands[n - 1], KME_RAND);
	wire_text(o, 1, imsi);
}

void kme_ask_establish(struct kme_call *c, const char *imsi, const char *origin, const char *imei, const char *attempt,
		       const uint8_t *payload, size_t size)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_ESTABLISH, is_digits(imsi) && is_digits(imei) && is_attempt(attempt) && size &&
		  size <= MAX_PAYLOAD))
		return;
	wire_text(o, 5, origin);
	wire_bytes(o, 4, payload, size);
	wire_text(o, 3, attempt);
	wire_text(o, 2, imei);
	wire_text(o, 1, imsi);
}

void kme_ask_report(struct kme_call *c, const char *imsi, const char *origin, int ok, int no_provisioning)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_REPORT, is_digits(imsi)))
		return;
	c->once = !ok;
	wire_number(o, 4, (uint64_t)no_provisioning);
	wire_text(o, 3, origin);
	wire_number(o, 2, (uint64_t)ok);
	wire_text(o, 1, imsi);
}

void kme_ask_restore(struct kme_call *c, const char *imsi, const char *origin, const uint8_t *rand)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_RESTORE, is_digits(imsi)))
		return;
	wire_text(o, 3, origin);
	wire_bytes(o, 2, rand, KME_RAND);
	wire_text(o, 1, imsi);
}

void kme_ask_binding(struct kme_call *c, const char *imsi)
{
	if (asks(c, KME_BINDING, is_digits(imsi)))
		wire_text(&c->request, 1, imsi);
}

void kme_ask_equipment(struct kme_call *c, const char *imei, const char *imsi)
{
	if (!asks(c, KME_EQUIPMENT, is_digits(imei) && (!*imsi || is_digits(imsi))))
		return;
	wire_text(&c->request, 2, imsi);
	wire_text(&c->request, 1, imei);
}

static void link_newest(struct kme_call *c)
{
	c->newer = NULL;
	c->older = newest;
	*(newest ? &newest->newer : &oldest) = c;
	newest = c;
	if (!unsent)
		unsent = c;
	by_id[c->id % (uint64_t)service.calls] = c;
	under_way++;
}

/* A call that is under way no more is to be done. */
static void end_call(struct kme_call *c)
{
	if (unsent == c)
		unsent = c->newer;
	*(c->older ? &c->older->newer : &oldest) = c->newer;
	*(c->newer ? &c->newer->older : &newest) = c->older;
	by_id[c->id % (uint64_t)service.calls] = NULL;
	under_way--;
	c->newer = NULL;
	*(ended ? &last_ended->newer : &ended) = c;
	last_ended = c;
}

/* Sending: libcurl takes the body of the one request, which does not end, from here. */

/* All calls that there are to send, in a message. */
static void pack(void)
{
	size_t size;

	out_at = 0;
	out_size = PREFIX;
	for (; unsent; unsent = unsent->newer, out_size += size) {
		size = KME_CALL - unsent->request.from;
		if (out_size + size > sizeof(out))
			break;
		memcpy(out + out_size, unsent->octets + unsent->request.from, size);
	}
	size = out_size - PREFIX;
	if (!size)
		out_size = 0;
	memcpy(out, (const uint8_t[]){ 0, (uint8_t)(size >> 24), (uint8_t)(size >> 16), (uint8_t)(size >> 8),
				       (uint8_t)size }, PREFIX);
}

static size_t give(char *to, size_t one, size_t n, void *unused)
{
	n *= one;
	if (out_at == out_size)
		pack();
	paused = out_at == out_size;
	if (paused)
		return CURL_READFUNC_PAUSE;
	if (n > out_size - out_at)
		n = out_size - out_at;
	memcpy(to, out + out_at, n);
	out_at += n;
	return n;
}

/* Answers */

static void answered(struct kme_call *c)
{
	if (failures >= service.breaker)
		LOG_E("kme: %s answers again", service.url);
	failures = 0;
	end_call(c);
}

/* 0: it is none. */
static int take_answer(const uint8_t *data, size_t size)
{
	struct wire_in i = wire_open(data, size), answer = i, error;
	struct kme_call *c;
	uint64_t id = 0;
	uint32_t what = 0;

	while (wire_next(&i)) {
		if (i.field == ANSWER_ID)
			id = i.number;
		else if (i.field >= ANSWER_ERROR && i.field <= FIRST_METHOD + KME_EQUIPMENT && i.data) {
			what = i.field;
			answer = wire_open(i.data, i.size);
		}
	}
	if (i.broken)
		return 0;
	c = by_id[id % (uint64_t)service.calls];
	if (!c || c->id != id)
		return 1;	/* nobody waits for it any more */
	if (what == ANSWER_ERROR) {
		kme_parse_error("", 0, &c->reply);
		for (error = answer; wire_next(&error);)
			if (error.field == ERROR_REASON && error.data)
				kme_parse_error((const char *)error.data, error.size, &c->reply);
	} else if (what == FIRST_METHOD + (uint32_t)c->method) {
		kme_parse(c->method, answer.at, (size_t)(answer.end - answer.at), c->asked, &c->reply);
	} else {
		reply_is(&c->reply, KME_UNAVAILABLE, NO_ANSWER);
	}
	answered(c);
	return 1;
}

/* The last message: {}, or {"error":...}, and with a refusal "metadata":{"Kme-Reason":["..."]}. */
static void take_end(const uint8_t *data, size_t size)
{
	static const char before[] = "\"Kme-Reason\":[\"";
	char text[1024], *reason;

	if (size >= sizeof(text))
		size = sizeof(text) - 1;
	memcpy(text, data, size);
	text[size] = 0;
	course = strstr(text, "\"error\"") ? BROKEN : IN_ORDER;
	if (course == IN_ORDER || !(reason = strcasestr(text, before)))
		return;
	reason += sizeof(before) - 1;
	reason[strcspn(reason, "\"")] = 0;
	snprintf(refusal, sizeof(refusal), "%s", reason);
	course = TURNED_AWAY;
}

/* So much of it is whole messages; SIZE_MAX: it is not of this service. */
static size_t take_messages(const uint8_t *data, size_t size)
{
	size_t at = 0, length;

	if (course != GOES_ON)
		return size;

	while (size - at >= PREFIX) {
		struct wire_in i;

		length = (size_t)data[at + 1] << 24 | (size_t)data[at + 2] << 16 | (size_t)data[at + 3] << 8 | data[at + 4];
		if (data[at] & ~END_STREAM || length > MAX_RESPONSE)
			return SIZE_MAX;
		if (length > size - at - PREFIX)
			break;
		if (data[at] == END_STREAM) {
			take_end(data + at + PREFIX, length);
			return size;
		}
		for (i = wire_open(data + at + PREFIX, length); wire_next(&i);)
			if (i.field == ANSWERS && (!i.data || !take_answer(i.data, i.size)))
				return SIZE_MAX;
		if (i.broken)
			return SIZE_MAX;
		at += PREFIX + length;
	}
	return at;
}

static size_t take(char *data, size_t one, size_t n, void *unused)
{
	size_t used = 0, need;
	uint8_t *more;

	n *= one;
	if (!in_size && (used = take_messages((uint8_t *)data, n)) == SIZE_MAX)
		return CURL_WRITEFUNC_ERROR;
	if (used == n)
		return n;
	need = in_size + n - used;
	if (need > in_room) {
		if (!(more = realloc(in, 2 * need)))
			return CURL_WRITEFUNC_ERROR;
		in = more;
		in_room = 2 * need;
	}
	memcpy(in + in_size, data + used, n - used);
	in_size = need;
	if ((used = take_messages(in, in_size)) == SIZE_MAX)
		return CURL_WRITEFUNC_ERROR;
	in_size -= used;
	memmove(in, in + used, in_size);
	return n;
}

/* The stream */

static void close_stream(void)
{
	if (!stream)
		return;
	curl_multi_remove_handle(multi, stream);
	curl_easy_cleanup(stream);
	stream = NULL;
	paused = 0;
	course = GOES_ON;
	out_at = out_size = in_size = 0;
	unsent = oldest;
}

/*
 * The CA of this file and no other: beside it, libcurl trusts those of a folder of the system's, and may ask the system
 * itself.
 */
static int trust_alone(CURL *h, const char *ca)
{
	CURLcode folder = curl_easy_setopt(h, CURLOPT_CAPATH, NULL);

	return (folder && folder != CURLE_NOT_BUILT_IN) || curl_easy_setopt(h, CURLOPT_SSL_OPTIONS, 0L) ||
	       !ca || !*ca || curl_easy_setopt(h, CURLOPT_CAINFO, ca);
}

/*
 * One request, whose body are all calls, and whose response all answers, on a connection of its own. It is HTTP/2: over
 * TLS both sides agree on it, and on the socket it is known. 0: it has begun.
 */
static int open_stream(void)
{
	const char *socket = socket_path();
	char url[320];
	CURL *h = curl_easy_init();

	if (!h)
		return ENOMEM;
	snprintf(url, sizeof(url), "%s/kme.v1.KeyService/Stream", socket ? "http://keysvc" : service.url);
	curl_easy_setopt(h, CURLOPT_UNIX_SOCKET_PATH, socket);
	curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, socket ? "http" : "https");
	curl_easy_setopt(h, CURLOPT_HTTP_VERSION, (long)(socket ? CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE :
							 CURL_HTTP_VERSION_2TLS));
	curl_easy_setopt(h, CURLOPT_FRESH_CONNECT, 1L);
	curl_easy_setopt(h, CURLOPT_FORBID_REUSE, 1L);
	curl_easy_setopt(h, CURLOPT_TCP_KEEPALIVE, 1L);
	curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);	/* no alarm() in somebody else's process */
	curl_easy_setopt(h, CURLOPT_QUICK_EXIT, 1L);	/* nor a wait for a name server that hangs */
	curl_easy_setopt(h, CURLOPT_PROXY, "");
	curl_easy_setopt(h, CURLOPT_SSLCERT, service.cert);
	curl_easy_setopt(h, CURLOPT_SSLKEY, service.key);
	curl_easy_setopt(h, CURLOPT_HTTPHEADER, headers);
	curl_easy_setopt(h, CURLOPT_POST, 1L);
	curl_easy_setopt(h, CURLOPT_READFUNCTION, give);
	curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, take);
	if ((!socket && trust_alone(h, service.ca)) || curl_easy_setopt(h, CURLOPT_URL, url) ||
	    curl_multi_add_handle(multi, h)) {
		curl_easy_cleanup(h);
		return ENOMEM;
	}
	stream = h;
	return 0;
}

/* 0: the reply is there. */
static int in_vain(struct kme_call *c, enum kme_status status, const char *why)
{
	reply_is(&c->reply, status, why);
	return 0;
}

int kme_start(struct kme_call *c)
{
	struct wire_out *o = &c->request;

	if (!o->data)
		return 0;
	if (failures >= service.breaker && (oldest || kme_now() < retry_at))
		return in_vain(c, KME_UNAVAILABLE, "keysvc does not answer");
	if (under_way == service.calls)
		return in_vain(c, KME_BUSY, "too many calls under way");
	do
		c->id = ++last_id;
	while (by_id[c->id % (uint64_t)service.calls]);
	wire_message(o, FIRST_METHOD + (uint32_t)c->method, KME_CALL);
	wire_number(o, CALL_TIMEOUT, (uint64_t)service.timeout_ms);
	wire_number(o, CALL_ID, c->id);
	wire_message(o, CALLS, KME_CALL);
	if (o->full)
		return in_vain(c, KME_REFUSED, "MALFORMED");
	if (!stream && open_stream())
		return in_vain(c, KME_UNAVAILABLE, "out of memory");
	c->deadline = kme_now() + (uint64_t)service.timeout_ms;
	c->again = 0;
	link_newest(c);
	return 1;
}

/*
 * A service that hangs, or is away, is not waited for by everybody: after so many failures in a row all that are under
 * way fail with them, on a stream that is given up, and so does all that comes, but one call a second.
 */
static void failed(struct kme_call *c, const char *why)
{
	in_vain(c, KME_UNAVAILABLE, why);
	end_call(c);
	if (++failures < service.breaker)
		return;
	if (failures == service.breaker)
		LOG_E("kme: %s: %s (%s), %ld times in a row: calls fail at once from here on, but one a second",
		      service.url, why, methods[c->method], failures);
	retry_at = kme_now() + RETRY_MS;
	while ((c = oldest)) {
		in_vain(c, KME_UNAVAILABLE, why);
		end_call(c);
	}
	close_stream();
}

/*
 * The stream has ended. What has no answer goes to another stream, once: if the stream ended in order it was not begun,
 * and else it comes to the same, but for a report of a failure. If the stream was refused, that is the answer to all.
 */
static void stream_ended(const char *why)
{
	struct kme_call *c, *newer;
	int how = course;
	long code = 0;

	curl_easy_getinfo(stream, CURLINFO_RESPONSE_CODE, &code);
	close_stream();
	for (c = oldest; c; c = newer) {
		newer = c->newer;
		if (how == TURNED_AWAY) {
			kme_parse_error(refusal, strlen(refusal), &c->reply);
			answered(c);
		} else if (code == 200 && !c->again && (how == IN_ORDER || !c->once)) {
			c->again = 1;
		} else {
			failed(c, why);
			newer = oldest ? newer : NULL;	/* all may have failed with it */
		}
	}
	if (oldest && open_stream())
		while (oldest)
			failed(oldest, "out of memory");
}

static void done_all(void)
{
	struct kme_call *c;

	while ((c = ended)) {
		ended = c->newer;
		c->done(c);
	}
}

static void run_timer(void)
{
	int n;

	if (timer_at > kme_now())
		return;
	timer_at = UINT64_MAX;
	curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &n);
}

static int is_stuck(void)
{
	long code = 0;

	return stream && watches == 1 && timer_at == UINT64_MAX &&
	       !curl_easy_getinfo(stream, CURLINFO_RESPONSE_CODE, &code) && code;
}

void kme_turn(int wait_ms)
{
	uint64_t now, until, woken;
	const char *why = NULL;
	struct kme_call *c;
	CURLMsg *m;
	nfds_t i;
	int n;

	if (paused && unsent) {
		paused = 0;
		curl_easy_pause(stream, CURLPAUSE_CONT);
	}
	run_timer();
	now = kme_now();
	until = now + (uint64_t)wait_ms;
	if (oldest && oldest->deadline < until)
		until = oldest->deadline;
	if (timer_at < until)
		until = timer_at;
	poll(watched, watches, ended ? 0 : until > now ? (int)(until - now) : 0);
	while (watched[0].revents && read(watched[0].fd, &woken, sizeof(woken)) > 0)
		;
	for (i = watches; --i > 0;) {	/* those that are gone meanwhile are replaced by ones that were seen to */
		short e = i < watches ? watched[i].revents : 0;

		watched[i].revents = 0;
		if (e)
			curl_multi_socket_action(multi, watched[i].fd, (e & POLLIN ? CURL_CSELECT_IN : 0) |
						 (e & POLLOUT ? CURL_CSELECT_OUT : 0) |
						 (e & (POLLERR | POLLHUP) ? CURL_CSELECT_ERR : 0), &n);
	}
	run_timer();
	/*
	 * A response that has ended while the request's body has a pause is not told of by libcurl 7.88, Debian 12's:
	 * it only waits for nothing any more. Its end may then be there to be read, or not.
	 */
	if (is_stuck()) {
		curl_easy_pause(stream, CURLPAUSE_CONT);
		run_timer();
		if (is_stuck() && course == GOES_ON)
			why = "the stream has ended";
	}
	while ((m = curl_multi_info_read(multi, &n)))
		if (m->msg == CURLMSG_DONE && m->easy_handle == stream)
			why = m->data.result == CURLE_WRITE_ERROR ? NO_ANSWER :
			      m->data.result ? curl_easy_strerror(m->data.result) : "the stream has ended";
	if (course != GOES_ON || why)
		stream_ended(why ? why : "the stream has ended");
	for (now = kme_now(); (c = oldest) && c->deadline <= now;)
		failed(c, "no answer within timeout_ms");
	done_all();
}

void kme_service_end(void)
{
	struct kme_call *c;

	while ((c = oldest)) {
		in_vain(c, KME_UNAVAILABLE, "the daemon ends");
		end_call(c);
	}
	done_all();
	close_stream();
	free(by_id);
	free(in);
	curl_multi_cleanup(multi);
	curl_slist_free_all(headers);
	curl_global_cleanup();
}

void kme_wake_end(void)
{
	if (watched[0].fd >= 0)
		close(watched[0].fd);
}
