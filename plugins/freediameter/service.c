/* SPDX-License-Identifier: Apache-2.0 */
#include "service.h"

#include <curl/curl.h>
#include <gnutls/gnutls.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <freeDiameter/extension.h>

#define MAX_PAYLOAD	512	/* a lot of 4096 bits */
#define RETRY_MS	1000	/* how long nobody is asked before one call tries again */

static const char *const methods[] = {
	"PrepareVector", "EstablishKME", "ReportAuthentication", "RestoreRAND", "GetBinding",
};

static struct kme_service service;
static CURLM *multi;
static struct curl_slist *headers;
static CURL **idle;			/* handles for calls to come */
static long idles;
static struct kme_call *oldest, *newest;	/* under way, in the order of their deadlines */
static long under_way;
static int wake_fd = -1;
static long failures;			/* in a row; service.breaker of them open the circuit breaker */
static uint64_t retry_at;		/* while it is open */

uint64_t kme_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static size_t take(char *data, size_t one, size_t n, void *to)
{
	struct kme_call *c = to;

	n *= one;
	if (n > sizeof(c->text) - c->size)
		return 0;	/* ends the transfer */
	memcpy(c->text + c->size, data, n);
	c->size += n;
	return n;
}

/* NULL: it is https. */
static const char *socket_path(void)
{
	return strncmp(service.url, "unix:", 5) ? NULL : service.url + 5;
}

/*
 * On the socket each call that is under way has a connection of its own, HTTP/1.1, which is kept for others. Over TLS
 * one connection carries all, HTTP/2, as both sides agree. (HTTP/2 without TLS fails in libcurl 7.88, Debian 12's, from
 * the second request of a connection on, and costs both sides more.)
 */
static int new_multi(void)
{
	multi = curl_multi_init();
	if (!multi)
		return ENOMEM;
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, service.calls);
	curl_multi_setopt(multi, CURLMOPT_MAX_CONCURRENT_STREAMS, service.calls);
	curl_multi_setopt(multi, CURLMOPT_MAX_HOST_CONNECTIONS, socket_path() ? service.calls : 16);
	return 0;
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

static CURL *new_handle(void)
{
	const char *socket = socket_path();
	CURL *h = curl_easy_init();

	if (!h)
		return NULL;
	curl_easy_setopt(h, CURLOPT_UNIX_SOCKET_PATH, socket);
	curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, socket ? "http" : "https");
	curl_easy_setopt(h, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_2TLS);
	curl_easy_setopt(h, CURLOPT_PIPEWAIT, socket ? 0L : 1L);
	curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);	/* no alarm() in somebody else's process */
	curl_easy_setopt(h, CURLOPT_QUICK_EXIT, 1L);	/* nor a wait for a name server that hangs */
	curl_easy_setopt(h, CURLOPT_PROXY, "");
	if (!socket && trust_alone(h, service.ca)) {
		curl_easy_cleanup(h);
		return NULL;
	}
	curl_easy_setopt(h, CURLOPT_SSLCERT, service.cert);
	curl_easy_setopt(h, CURLOPT_SSLKEY, service.key);
	curl_easy_setopt(h, CURLOPT_HTTPHEADER, headers);
	curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, take);
	return h;
}

int kme_service_start(const struct kme_service *of)
{
	service = *of;
	if (curl_global_init(CURL_GLOBAL_DEFAULT))
		return ENOMEM;
	headers = curl_slist_append(NULL, "Content-Type: application/json");
	idle = calloc((size_t)service.calls, sizeof(*idle));
	if (!headers || !idle || new_multi())
		return ENOMEM;
	wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return wake_fd < 0 ? errno : 0;
}

void kme_wake(void)
{
	const uint64_t one = 1;

	if (write(wake_fd, &one, sizeof(one)) < 0)
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

static json_t *base64(const uint8_t *data, size_t size)
{
	gnutls_datum_t in = { (unsigned char *)data, (unsigned int)size }, out = { NULL, 0 };
	json_t *text;

	if (gnutls_base64_encode2(&in, &out))
		return NULL;
	text = json_stringn((char *)out.data, out.size);
	gnutls_free(out.data);
	return text;
}

/* of exactly this size */
static int unbase64(const json_t *text, uint8_t *out, size_t size)
{
	gnutls_datum_t in, raw = { NULL, 0 };
	int ok;

	if (!json_is_string(text))
		return 0;
	in.data = (unsigned char *)json_string_value(text);
	in.size = (unsigned int)json_string_length(text);
	if (!in.size || gnutls_base64_decode2(&in, &raw))
		return 0;
	ok = raw.size == size;
	if (ok)
		memcpy(out, raw.data, size);
	gnutls_free(raw.data);
	return ok;
}

static void reply_is(struct kme_reply *r, enum kme_status status, const char *reason)
{
	memset(r, 0, sizeof(*r));
	r->status = status;
	snprintf(r->reason, sizeof(r->reason), "%s", reason);
}

void kme_parse_error(const char *reason, struct kme_reply *out)
{
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

	if (!reason || !only(reason, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_", 1, KME_REASON))
		reason = "no Kme-Reason";
	reply_is(out, KME_UNAVAILABLE, reason);	/* also what nobody understands */
	for (i = 0; i < sizeof(known) / sizeof(*known); i++)
		if (!strcmp(reason, known[i].reason))
			out->status = known[i].status;
}

/* Whether what the IMSI's device may be let in for stands there. Only with PROVISIONING_ONLY there is an attempt. */
static int parse_control(const json_t *root, int with_attempt, struct kme_reply *out)
{
	const char *control = json_string_value(json_object_get(root, "control"));
	const char *attempt = json_string_value(json_object_get(root, "attempt_id"));

	if (!control)
		return 0;
	if (!strcmp(control, "PREPROCESSED"))
		out->control = KME_PREPROCESSED;
	else if (!strcmp(control, "PROVISIONING_ONLY"))
		out->control = KME_PROVISIONING_ONLY;
	if (with_attempt && out->control == KME_PROVISIONING_ONLY) {
		if (!attempt || !is_attempt(attempt))
			return 0;
		snprintf(out->attempt, sizeof(out->attempt), "%s", attempt);
	} else if (attempt && *attempt) {
		return 0;
	}
	return out->control != KME_NO_CONTROL;
}

static int parse_rands(const json_t *rands, size_t asked, struct kme_reply *out)
{
	size_t i;

	if (!json_is_array(rands) || json_array_size(rands) != asked || asked > KME_RANDS)
		return 0;
	for (i = 0; i < asked; i++)
		if (!unbase64(json_array_get(rands, i), out->rands[i], KME_RAND))
			return 0;
	return 1;
}

static int parse_binding(const json_t *root, struct kme_reply *out)
{
	const char *state = json_string_value(json_object_get(root, "state"));

	if (!state)
		return 0;
	out->bound = !strcmp(state, "PENDING") || !strcmp(state, "ACTIVE");
	return out->bound || !strcmp(state, "REVOKED");
}

void kme_parse(enum kme_method method, const char *json, size_t size, size_t asked, struct kme_reply *out)
{
	json_t *root = json_loadb(json, size, JSON_REJECT_DUPLICATES, NULL);
	int ok = 0;

	reply_is(out, KME_OK, "");
	switch (method) {
	case KME_PREPARE:
		ok = parse_control(root, 1, out) && parse_rands(json_object_get(root, "rands"), asked, out);
		break;
	case KME_ESTABLISH:
		ok = unbase64(json_object_get(root, "nw_sig"), out->nw_sig, KME_NW_SIG);
		break;
	case KME_REPORT:
		ok = parse_control(root, 0, out);
		break;
	case KME_RESTORE:
		ok = unbase64(json_object_get(root, "rand"), out->rands[0], KME_RAND);
		break;
	case KME_BINDING:
		ok = parse_binding(root, out);
		break;
	}
	json_decref(root);
	if (!ok)
		reply_is(out, KME_UNAVAILABLE, "no answer of this service");
}

/* Takes the request. */
static void ask(struct kme_call *c, enum kme_method method, json_t *request)
{
	c->method = method;
	c->body = request ? json_dumps(request, JSON_COMPACT) : NULL;
	json_decref(request);
	if (!c->body)
		reply_is(&c->reply, KME_UNAVAILABLE, "out of memory");
}

static int asks_well(struct kme_call *c, int well)
{
	if (!well)
		reply_is(&c->reply, KME_REFUSED, "MALFORMED");
	return well;
}

void kme_ask_prepare(struct kme_call *c, const char *imsi, const char *origin, uint8_t *const *rands, size_t n,
		     int no_provisioning)
{
	json_t *list;
	size_t i;

	if (!asks_well(c, is_digits(imsi) && n && n <= KME_RANDS))
		return;
	list = json_array();
	for (i = 0; i < n; i++)
		if (json_array_append_new(list, base64(rands[i], KME_RAND))) {
			json_decref(list);
			list = NULL;
		}
	c->asked = n;
	ask(c, KME_PREPARE, json_pack("{s:s, s:s, s:b, s:o}", "imsi", imsi, "origin", origin,
				      "no_provisioning", no_provisioning, "rands", list));
}

void kme_ask_establish(struct kme_call *c, const char *imsi, const char *origin, const char *imei, const char *attempt,
		       const uint8_t *payload, size_t size)
{
	if (asks_well(c, is_digits(imsi) && is_digits(imei) && is_attempt(attempt) && size && size <= MAX_PAYLOAD))
		ask(c, KME_ESTABLISH, json_pack("{s:s, s:s, s:s, s:s, s:o}", "imsi", imsi, "origin", origin,
						"imei", imei, "attempt_id", attempt,
						"payload", base64(payload, size)));
}

void kme_ask_report(struct kme_call *c, const char *imsi, const char *origin, int ok, int no_provisioning)
{
	if (asks_well(c, is_digits(imsi)))
		ask(c, KME_REPORT, json_pack("{s:s, s:s, s:b, s:b}", "imsi", imsi, "origin", origin, "ok", ok,
					     "no_provisioning", no_provisioning));
}

void kme_ask_restore(struct kme_call *c, const char *imsi, const char *origin, const uint8_t *rand)
{
	if (asks_well(c, is_digits(imsi)))
		ask(c, KME_RESTORE, json_pack("{s:s, s:s, s:o}", "imsi", imsi, "origin", origin,
					      "rand", base64(rand, KME_RAND)));
}

void kme_ask_binding(struct kme_call *c, const char *imsi)
{
	if (asks_well(c, is_digits(imsi)))
		ask(c, KME_BINDING, json_pack("{s:s}", "imsi", imsi));
}

static void link_newest(struct kme_call *c)
{
	c->newer = NULL;
	c->older = newest;
	*(newest ? &newest->newer : &oldest) = c;
	newest = c;
	under_way++;
}

/* Ends a call that is under way: its handle is for others. */
static void unlink_call(struct kme_call *c)
{
	*(c->older ? &c->older->newer : &oldest) = c->newer;
	*(c->newer ? &c->newer->older : &newest) = c->older;
	under_way--;
	curl_multi_remove_handle(multi, c->curl);
	idle[idles++] = c->curl;
	c->curl = NULL;
	free(c->body);
	c->body = NULL;
}

int kme_start(struct kme_call *c)
{
	const char *base = socket_path() ? "http://keysvc" : service.url;
	char url[320];

	if (!c->body)
		return 0;
	if (failures >= service.breaker && (oldest || kme_now() < retry_at)) {
		reply_is(&c->reply, KME_UNAVAILABLE, "keysvc does not answer");
		goto unasked;
	}
	if (under_way == service.calls) {
		reply_is(&c->reply, KME_BUSY, "too many calls under way");
		goto unasked;
	}
	c->curl = idles ? idle[--idles] : new_handle();
	if (!c->curl)
		goto no_memory;
	snprintf(url, sizeof(url), "%s/kme.v1.KeyService/%s", base, methods[c->method]);
	c->size = 0;
	if (curl_easy_setopt(c->curl, CURLOPT_URL, url) || curl_easy_setopt(c->curl, CURLOPT_POSTFIELDS, c->body) ||
	    curl_easy_setopt(c->curl, CURLOPT_WRITEDATA, c) || curl_easy_setopt(c->curl, CURLOPT_PRIVATE, c) ||
	    curl_multi_add_handle(multi, c->curl)) {
		curl_easy_cleanup(c->curl);
		c->curl = NULL;
		goto no_memory;
	}
	c->deadline = kme_now() + (uint64_t)service.timeout_ms;
	link_newest(c);
	return 1;
no_memory:
	reply_is(&c->reply, KME_UNAVAILABLE, "out of memory");
unasked:
	free(c->body);
	c->body = NULL;
	return 0;
}

static void append(struct kme_call *c, struct kme_call ***last)
{
	c->newer = NULL;
	**last = c;
	*last = &c->newer;
}

/*
 * A service that hangs, or is away, is not waited for by everybody: after so many failures in a row all that are under
 * way fail with them, on a connection that is not used again, and so does all that comes, but one call a second.
 */
static void failed(struct kme_call *c, const char *why, struct kme_call ***last)
{
	CURLM *before = multi;

	reply_is(&c->reply, KME_UNAVAILABLE, why);
	if (++failures < service.breaker)
		return;
	if (failures == service.breaker)
		LOG_E("kme: %s: %s (%s), %ld times in a row: calls fail at once from here on, but one a second",
		      service.url, why, methods[c->method], failures);
	retry_at = kme_now() + RETRY_MS;
	while ((c = oldest)) {
		unlink_call(c);
		reply_is(&c->reply, KME_UNAVAILABLE, why);
		append(c, last);
	}
	if (new_multi())
		multi = before;
	else
		curl_multi_cleanup(before);
}

static void answered(struct kme_call *c)
{
	struct curl_header *reason;
	long code = 0;

	if (failures >= service.breaker)
		LOG_E("kme: %s answers again", service.url);
	failures = 0;
	curl_easy_getinfo(c->curl, CURLINFO_RESPONSE_CODE, &code);
	if (code == 200)
		kme_parse(c->method, c->text, c->size, c->asked, &c->reply);
	else if (curl_easy_header(c->curl, "Kme-Reason", 0, CURLH_HEADER, -1, &reason))
		kme_parse_error(NULL, &c->reply);
	else
		kme_parse_error(reason->value, &c->reply);
}

void kme_turn(int wait_ms)
{
	struct curl_waitfd wake = { wake_fd, CURL_WAIT_POLLIN, 0 };
	struct kme_call *ended = NULL, **last = &ended, *c;
	uint64_t now = kme_now(), woken;
	CURLMsg *m;
	int n;

	if (oldest && oldest->deadline < now + (uint64_t)wait_ms)
		wait_ms = oldest->deadline > now ? (int)(oldest->deadline - now) : 0;
	curl_multi_poll(multi, &wake, 1, wait_ms, NULL);
	while (read(wake_fd, &woken, sizeof(woken)) > 0)
		;
	curl_multi_perform(multi, &n);
	while ((m = curl_multi_info_read(multi, &n))) {
		CURLcode result = m->data.result;

		if (m->msg != CURLMSG_DONE || curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&c))
			continue;
		if (!result)
			answered(c);
		unlink_call(c);
		append(c, &last);
		if (result)
			failed(c, result == CURLE_WRITE_ERROR ? "its answer is too long" :
					  curl_easy_strerror(result), &last);
	}
	now = kme_now();
	while ((c = oldest) && c->deadline <= now) {
		unlink_call(c);
		append(c, &last);
		failed(c, "no answer within timeout_ms", &last);
	}
	while ((c = ended)) {
		ended = c->newer;
		c->done(c);
	}
}

void kme_service_end(void)
{
	struct kme_call *c;

	while ((c = oldest)) {
		unlink_call(c);
		reply_is(&c->reply, KME_UNAVAILABLE, "the daemon ends");
		c->done(c);
	}
	while (idles)
		curl_easy_cleanup(idle[--idles]);
	free(idle);
	curl_multi_cleanup(multi);
	curl_slist_free_all(headers);
	if (wake_fd >= 0)
		close(wake_fd);
	curl_global_cleanup();
}
