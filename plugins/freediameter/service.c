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
#define WATCH_MS	500		/* how often an instance that is away is asked whether it is ready */
#define READY_MS	2000		/* how long it has to say so */
#define PREFIX		5		/* of a message (connectrpc.com/docs/protocol): flags, and its length */
#define END_STREAM	2		/* the flag of the last message, which is JSON */
#define MAX_REQUEST	60000		/* of a message; the service takes 64 KiB */
#define MAX_RESPONSE	(1u << 20)	/* several times what all answers of a stream are */
#define MAX_SOCKETS	(16 * KME_INSTANCES)	/* those of libcurl: of two connections, and of what finds an address */
#define NO_ANSWER	"no answer of this service"
#define NO_REASON	"no Kme-Reason"

static const char *const methods[] = {
	"PrepareVector", "EstablishKME", "ReportAuthentication", "RestoreRAND", "GetBinding",
	"CheckEquipment",
};

/* Fields of kme.proto. */
enum { CALLS = 1, ANSWERS = 1, CALL_ID = 1, CALL_TIMEOUT = 2, ANSWER_ID = 1, ANSWER_ERROR = 2, ERROR_CODE = 1,
       ERROR_REASON = 2 };
enum { FIRST_METHOD = 3 };	/* of Call and of Answer: the methods follow in the order of enum kme_method */

/* An instance is one keysvc. */
struct instance {
	const char *url;
	CURL *stream;			/* NULL: there is none */
	int paused;			/* it has nothing to send */
	int silent;			/* a call has had no answer: it is closed once none is under way */
	uint64_t heard;			/* when anything came last */
	enum { GOES_ON, IN_ORDER, BROKEN, TURNED_AWAY } course;	/* how it has ended, if it has */
	const char *why;		/* it has ended, if libcurl says so */
	char refusal[KME_REASON + 1];
	struct kme_call *oldest, *newest;	/* under way here */
	struct kme_call *unsent;	/* the first of them that the stream has not been given, with all newer ones */
	uint8_t out[PREFIX + MAX_REQUEST];	/* the message that is being sent */
	size_t out_at, out_size;
	uint8_t *in;			/* what has come of messages that are not whole */
	size_t in_size, in_room;
	int away;			/* it gets no calls until it is ready, as long as another is not away */
	CURL *watch;			/* asks whether it is ready; NULL: nobody does */
	uint64_t watch_at;		/* when it is asked next */
};

static struct kme_service service;
static struct instance *instances;	/* service.n */
static unsigned turn;			/* whose it is to get the next call */
static CURLM *multi;
static struct curl_slist *headers;
static uint64_t timer_at = UINT64_MAX;	/* when libcurl wants to be called */
static struct pollfd watched[1 + MAX_SOCKETS] = { { .fd = -1, .events = POLLIN } };	/* who wakes us, and sockets */
static CURL *owners[1 + MAX_SOCKETS];	/* whose each of them is */
static nfds_t watches = 1;
static struct kme_call **by_id;		/* those under way, at id % service.calls */
static uint64_t earliest;		/* none of them ends its wait before */
static struct kme_call *ended, *last_ended;	/* to be done */
static long under_way;
static uint64_t last_id;
static long failures;			/* in a row; service.breaker of them open the circuit breaker */
static uint64_t retry_at;		/* while it is open */

uint64_t kme_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

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

int kme_service_start(const struct kme_service *of)
{
	int i;

	service = *of;
	instances = calloc((size_t)service.n, sizeof(*instances));
	if (!instances) {
		service.n = 0;
		return ENOMEM;
	}
	for (i = 0; i < service.n; i++)
		instances[i].url = service.urls[i];
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
		strcpy(said, NO_REASON);
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

static void link_newest(struct kme_call *c, struct instance *i)
{
	c->at = i;
	c->newer = NULL;
	c->older = i->newest;
	*(i->newest ? &i->newest->newer : &i->oldest) = c;
	i->newest = c;
	if (!i->unsent)
		i->unsent = c;
	by_id[c->id % (uint64_t)service.calls] = c;
	under_way++;
}

static void unlink_call(struct kme_call *c)
{
	struct instance *i = c->at;

	if (i->unsent == c)
		i->unsent = c->newer;
	*(c->older ? &c->older->newer : &i->oldest) = c->newer;
	*(c->newer ? &c->newer->older : &i->newest) = c->older;
	by_id[c->id % (uint64_t)service.calls] = NULL;
	under_way--;
	c->newer = NULL;
}

/* A call that is under way no more is to be done. */
static void end_call(struct kme_call *c)
{
	unlink_call(c);
	*(ended ? &last_ended->newer : &ended) = c;
	last_ended = c;
}

/* Sending: libcurl takes the body of the one request, which does not end, from here. */

/* All calls that there are to send, in a message. */
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

static void answered(struct kme_call *c)
{
	if (failures >= service.breaker)
		LOG_E("kme: %s answers again", c->at->url);
	failures = 0;
	end_call(c);
}

/* An instance gets no calls until it says that it is ready, as long as another does. */
static void leave(struct instance *i, const char *why)
{
	if (service.n == 1 || i->away)
		return;
	LOG_E("kme: %s: %s: it gets no calls until it is ready, unless all are away", i->url, why);
	i->away = 1;
	i->watch_at = kme_now();
}

/* Whose turn it is of those that a call was not made at: one that is not away, if there is one. NULL: there is none. */
static struct instance *pick(const struct kme_call *c)
{
	struct instance *picked = NULL;
	int n;

	for (n = 0; n < service.n; n++) {
		int at = (int)((turn + (unsigned)n) % (unsigned)service.n);
		struct instance *i = &instances[at];

		if (c->tried & 1u << at || (picked && i->away))
			continue;
		picked = i;
		if (!i->away)
			break;
	}
	return picked;
}

static int is_text(const struct wire_in *i, const char *text)
{
	return i->data && i->size == strlen(text) && !memcmp(i->data, text, i->size);
}

/*
 * An error of a call. An instance that has lost its HSM or its store, or has not had the time, is left; what another
 * one may do goes there.
 */
static void take_error(struct kme_call *c, struct wire_in *error)
{
	const char *reason = c->reply.reason;
	int gone = 0, lost;

	kme_parse_error("", 0, &c->reply);
	while (wire_next(error)) {
		if (error->field == ERROR_REASON && error->data)
			kme_parse_error((const char *)error->data, error->size, &c->reply);
		else if (error->field == ERROR_CODE)
			gone = is_text(error, "unavailable") || is_text(error, "deadline_exceeded");
	}
	lost = !strcmp(reason, "HSM_UNAVAILABLE") || !strcmp(reason, "STORE_UNAVAILABLE") ||
	       (gone && !strcmp(reason, NO_REASON));
	if (lost)
		leave(c->at, reason);
	if ((lost || !strcmp(reason, "OVERLOADED") || !strcmp(reason, "DIRECTORY_UNAVAILABLE")) && !c->once && pick(c))
		c->until = earliest = 0;	/* libcurl runs: nothing can be sent now */
	else
		answered(c);
}

/* 0: it is none. */
static int take_answer(struct instance *from, const uint8_t *data, size_t size)
{
	struct wire_in i = wire_open(data, size), answer = i;
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
	if (!c || c->id != id || c->at != from)
		return 1;	/* nobody waits for it any more */
	if (what == ANSWER_ERROR) {
		take_error(c, &answer);
		return 1;
	}
	if (what == FIRST_METHOD + (uint32_t)c->method)
		kme_parse(c->method, answer.at, (size_t)(answer.end - answer.at), c->asked, &c->reply);
	else
		reply_is(&c->reply, KME_UNAVAILABLE, NO_ANSWER);
	answered(c);
	return 1;
}

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

/* So much of it is whole messages; SIZE_MAX: it is not of this service. */
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
			if (i.field == ANSWERS && (!i.data || !take_answer(from, i.data, i.size)))
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

static void close_stream(struct instance *i)
{
	end_request(&i->stream);
	i->paused = i->silent = 0;
	i->course = GOES_ON;
	i->why = NULL;
	i->out_at = i->out_size = i->in_size = 0;
	i->unsent = i->oldest;
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
 * A request of an instance, on a connection of its own. It is HTTP/2: over TLS both sides agree on it, and on the
 * socket it is known. NULL: there is no memory.
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
	/* a name's first address has half of it, if there are more: without this, half of 300 seconds */
	curl_easy_setopt(h, CURLOPT_CONNECTTIMEOUT_MS, (long)service.timeout_ms);
	curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);	/* no alarm() in somebody else's process */
	curl_easy_setopt(h, CURLOPT_QUICK_EXIT, 1L);	/* nor a wait for a name server that hangs */
	curl_easy_setopt(h, CURLOPT_PROXY, "");
	curl_easy_setopt(h, CURLOPT_SSLCERT, service.cert);
	curl_easy_setopt(h, CURLOPT_SSLKEY, service.key);
	if ((!socket && trust_alone(h, service.ca)) || curl_easy_setopt(h, CURLOPT_URL, url)) {
		curl_easy_cleanup(h);
		return NULL;
	}
	return h;
}

/* 0: it has begun. */
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

/* One request, whose body are all calls, and whose response all answers. 0: it has begun. */
static int open_stream(struct instance *i)
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
static void watch(struct instance *i)
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
	if (result || code != 200)
		return;
	i->away = 0;
	failures = 0;
	LOG_E("kme: %s is ready again", i->url);
}

/* 0: the reply is there. */
static int in_vain(struct kme_call *c, enum kme_status status, const char *why)
{
	reply_is(&c->reply, status, why);
	return 0;
}

/* The message of a call, with the time that it has. 0: it is too long. */
static int write_call(struct kme_call *c, uint64_t ms)
{
	struct wire_out *o = &c->request;

	o->from = c->asks;
	wire_message(o, FIRST_METHOD + (uint32_t)c->method, KME_CALL);
	wire_number(o, CALL_TIMEOUT, ms);
	wire_number(o, CALL_ID, c->id);
	wire_message(o, CALLS, KME_CALL);
	return !o->full;
}

/* Makes a call at an instance. If it may be made at another, half of its time is kept for that. 0: there is a reply. */
static int send_to(struct kme_call *c, struct instance *i)
{
	uint64_t now = kme_now(), left = c->deadline > now ? c->deadline - now : 1;

	c->tried |= 1u << (i - instances);
	if (!c->once && pick(c))
		left = (left + 1) / 2;
	if (!write_call(c, left))
		return in_vain(c, KME_REFUSED, "MALFORMED");
	if (!i->stream && open_stream(i))
		return in_vain(c, KME_UNAVAILABLE, "out of memory");
	c->sent = now;
	c->until = now + left;
	if (!under_way || c->until < earliest)
		earliest = c->until;
	link_newest(c, i);
	return 1;
}

int kme_start(struct kme_call *c)
{
	if (!c->request.data)
		return 0;
	if (failures >= service.breaker && (under_way || kme_now() < retry_at))
		return in_vain(c, KME_UNAVAILABLE, "keysvc does not answer");
	if (under_way == service.calls)
		return in_vain(c, KME_BUSY, "too many calls under way");
	do
		c->id = ++last_id;
	while (by_id[c->id % (uint64_t)service.calls]);
	c->asks = c->request.from;
	c->deadline = kme_now() + (uint64_t)service.timeout_ms;
	c->tried = 0;
	c->again = 0;
	turn = (turn + 1) % (unsigned)service.n;
	return send_to(c, pick(c));
}

/*
 * A service that hangs, or is away, is not waited for by everybody: after so many failures in a row all that are under
 * way fail with them, on streams that are given up, and so does all that comes, but one call a second.
 */
static void failed(struct kme_call *c, const char *why)
{
	int i;

	in_vain(c, KME_UNAVAILABLE, why);
	end_call(c);
	if (++failures < service.breaker)
		return;
	if (failures == service.breaker)
		LOG_E("kme: %s: %s (%s), %ld times in a row: calls fail at once from here on, but one a second",
		      c->at->url, why, methods[c->method], failures);
	retry_at = kme_now() + RETRY_MS;
	for (i = 0; i < service.n; i++) {
		while ((c = instances[i].oldest)) {
			in_vain(c, KME_UNAVAILABLE, why);
			end_call(c);
		}
		close_stream(&instances[i]);
	}
}

/* Makes a call that is under way at another instance. 0: there is none. */
static int move(struct kme_call *c, struct instance *to)
{
	if (!to)
		return 0;
	unlink_call(c);
	if (send_to(c, to))
		return 1;
	link_newest(c, c->at);
	return 0;
}

/*
 * The stream has ended. What has no answer goes to another instance, or else once to another stream: if the stream
 * ended in order it was not begun, and else it comes to the same, but for a report of a failure. If the stream was
 * refused, that is the answer to all.
 */
static void stream_ended(struct instance *i)
{
	const char *why = i->why ? i->why : "the stream has ended";
	struct kme_call *c, *newer, *last = i->newest;
	int how = i->course;
	long code = 0;

	curl_easy_getinfo(i->stream, CURLINFO_RESPONSE_CODE, &code);
	close_stream(i);
	if (last && how != TURNED_AWAY)
		leave(i, why);
	for (c = i->oldest; c && under_way; c = newer) {	/* with one that fails, all may */
		struct instance *next = NULL;

		newer = c == last ? NULL : c->newer;
		if (how == TURNED_AWAY) {
			kme_parse_error(i->refusal, strlen(i->refusal), &c->reply);
			answered(c);
			continue;
		}
		if (how == IN_ORDER || !c->once)
			next = pick(c);
		if (!next && code == 200 && !c->again && (how == IN_ORDER || !c->once)) {
			c->again = 1;
			next = i;
		}
		if (!move(c, next))
			failed(c, why);
	}
}

/*
 * Calls that have waited long enough where they are go to another instance, if they may. The stream ends on which
 * nothing at all came meanwhile: its instance may be ready, and it would not be closed while calls are under way.
 */
static void end_waits(void)
{
	static const char silence[] = "no answer within timeout_ms";
	uint64_t now = kme_now();
	int n;

	if (!under_way || now < earliest)
		return;
	earliest = UINT64_MAX;
	for (n = 0; n < service.n; n++) {
		struct instance *i = &instances[n];
		struct kme_call *c, *newer, *last = i->newest;

		for (c = i->oldest; c; c = newer) {
			int refused = !c->until;

			newer = c == last ? NULL : c->newer;
			if (c->until > now) {
				if (c->until < earliest)
					earliest = c->until;
				continue;
			}
			if (!refused) {
				leave(i, silence);
				i->silent = 1;
				if (service.n > 1 && i->heard <= c->sent)
					i->why = silence;
			}
			if (move(c, c->once ? NULL : pick(c)))
				continue;
			if (refused)
				answered(c);
			else
				failed(c, silence);
			if (!under_way)
				return;
		}
	}
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

void kme_turn(int wait_ms)
{
	uint64_t now = kme_now(), until = now + (uint64_t)wait_ms, woken;
	struct instance *i, *end = instances + service.n;
	CURLMsg *m;
	nfds_t k;
	int n;

	for (i = instances; i < end; i++) {
		if (i->paused && i->unsent) {
			i->paused = 0;
			curl_easy_pause(i->stream, CURLPAUSE_CONT);
		}
		if (!i->away || i->watch)
			continue;
		if (i->watch_at <= now)
			watch(i);
		if (i->watch_at < until)
			until = i->watch_at;
	}
	run_timer();
	now = kme_now();
	if (under_way && earliest < until)
		until = earliest;
	if (timer_at < until)
		until = timer_at;
	poll(watched, watches, ended ? 0 : until > now ? (int)(until - now) : 0);
	while (watched[0].revents && read(watched[0].fd, &woken, sizeof(woken)) > 0)
		;
	for (k = watches; --k > 0;) {	/* those that are gone meanwhile are replaced by ones that were seen to */
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
	for (i = instances; i < end; i++)
		if (i->course != GOES_ON || i->why)
			stream_ended(i);
	end_waits();
	for (i = instances; i < end; i++) {
		if (i->why)
			stream_ended(i);
		else if (i->silent && !i->oldest)
			close_stream(i);
	}
	done_all();
}

void kme_service_end(void)
{
	struct instance *i;
	struct kme_call *c;

	for (i = instances; i < instances + service.n; i++)
		while ((c = i->oldest)) {
			in_vain(c, KME_UNAVAILABLE, "the daemon ends");
			end_call(c);
		}
	done_all();
	for (i = instances; i < instances + service.n; i++) {
		close_stream(i);
		end_request(&i->watch);
		free(i->in);
	}
	free(instances);
	free(by_id);
	curl_multi_cleanup(multi);
	curl_slist_free_all(headers);
	curl_global_cleanup();
}

void kme_wake_end(void)
{
	if (watched[0].fd >= 0)
		close(watched[0].fd);
}
