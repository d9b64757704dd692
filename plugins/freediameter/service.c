/* SPDX-License-Identifier: Apache-2.0 */
#include "service.h"

#include <curl/curl.h>
#include <gnutls/gnutls.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include <freeDiameter/extension.h>

#define MAX_REPLY	16384	/* several times the longest */
#define MAX_PAYLOAD	512	/* a lot of 4096 bits */

struct kme_caller {
	const struct kme_service *service;
	CURL *curl;
	struct curl_slist *headers;
	char base[256];
	char reply[MAX_REPLY];
	size_t size;
};

static size_t take(char *data, size_t one, size_t n, void *to)
{
	struct kme_caller *c = to;

	n *= one;
	if (n > sizeof(c->reply) - c->size)
		return 0;	/* ends the transfer */
	memcpy(c->reply + c->size, data, n);
	c->size += n;
	return n;
}

struct kme_caller *kme_caller_new(const struct kme_service *service)
{
	struct kme_caller *c = calloc(1, sizeof(*c));
	const char *socket = strncmp(service->url, "unix:", 5) ? NULL : service->url + 5;

	if (!c)
		return NULL;
	c->service = service;
	c->curl = curl_easy_init();
	c->headers = curl_slist_append(NULL, "Content-Type: application/json");
	if (!c->curl || !c->headers) {
		kme_caller_free(c);
		return NULL;
	}
	snprintf(c->base, sizeof(c->base), "%s", socket ? "http://keysvc" : service->url);
	curl_easy_setopt(c->curl, CURLOPT_UNIX_SOCKET_PATH, socket);
	curl_easy_setopt(c->curl, CURLOPT_PROTOCOLS_STR, socket ? "http" : "https");
	curl_easy_setopt(c->curl, CURLOPT_NOSIGNAL, 1L);	/* no alarm() in somebody else's process */
	curl_easy_setopt(c->curl, CURLOPT_PROXY, "");
	curl_easy_setopt(c->curl, CURLOPT_TIMEOUT_MS, service->timeout_ms);
	curl_easy_setopt(c->curl, CURLOPT_CAINFO, service->ca);
	curl_easy_setopt(c->curl, CURLOPT_SSLCERT, service->cert);
	curl_easy_setopt(c->curl, CURLOPT_SSLKEY, service->key);
	curl_easy_setopt(c->curl, CURLOPT_HTTPHEADER, c->headers);
	curl_easy_setopt(c->curl, CURLOPT_WRITEFUNCTION, take);
	curl_easy_setopt(c->curl, CURLOPT_WRITEDATA, c);
	return c;
}

void kme_caller_free(struct kme_caller *c)
{
	if (!c)
		return;
	curl_easy_cleanup(c->curl);
	curl_slist_free_all(c->headers);
	free(c);
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
	gnutls_datum_t in = { (unsigned char *)data, size }, out = { NULL, 0 };
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
	in.size = json_string_length(text);
	if (!in.size || gnutls_base64_decode2(&in, &raw))
		return 0;
	ok = raw.size == size;
	if (ok)
		memcpy(out, raw.data, size);
	gnutls_free(raw.data);
	return ok;
}

static const struct {
	const char *reason;
	enum kme_status status;
} reasons[] = {
	{ "NO_ATTEMPT", KME_NO_ATTEMPT }, { "NOT_BOUND", KME_NOT_BOUND },
	{ "MALFORMED", KME_REFUSED }, { "UNKNOWN_DEVICE", KME_REFUSED }, { "REVOKED_DEVICE", KME_REFUSED },
	{ "OTHER_DEVICE", KME_REFUSED }, { "KME_REJECTED", KME_REFUSED }, { "CALLER_NOT_ALLOWED", KME_REFUSED },
};

enum kme_status kme_parse_reason(const char *reason)
{
	size_t i;

	for (i = 0; reason && i < sizeof(reasons) / sizeof(*reasons); i++)
		if (!strcmp(reason, reasons[i].reason))
			return reasons[i].status;
	return KME_UNAVAILABLE;	/* also what nobody understands */
}

enum kme_status kme_parse_vector(const char *json, size_t size, struct kme_vector *out)
{
	json_t *root = json_loadb(json, size, JSON_REJECT_DUPLICATES, NULL);
	const char *control = json_string_value(json_object_get(root, "control"));
	const char *attempt = json_string_value(json_object_get(root, "attempt_id"));
	enum kme_status status = KME_UNAVAILABLE;

	memset(out, 0, sizeof(*out));
	if (!control || !unbase64(json_object_get(root, "rand"), out->rand, KME_RAND))
		goto out;
	if (!strcmp(control, "PROVISIONING_ONLY") && attempt && is_attempt(attempt)) {
		snprintf(out->attempt, sizeof(out->attempt), "%s", attempt);
		status = KME_OK;
	} else if (!strcmp(control, "PREPROCESSED") && (!attempt || !*attempt)) {
		status = KME_OK;
	}
out:
	json_decref(root);
	return status;
}

enum kme_status kme_parse_nw_sig(const char *json, size_t size, uint8_t nw_sig[KME_NW_SIG])
{
	json_t *root = json_loadb(json, size, JSON_REJECT_DUPLICATES, NULL);
	int ok = unbase64(json_object_get(root, "nw_sig"), nw_sig, KME_NW_SIG);

	json_decref(root);
	return ok ? KME_OK : KME_UNAVAILABLE;
}

/* Takes the request; the reply is in c. */
static enum kme_status call(struct kme_caller *c, const char *method, json_t *request)
{
	char *body = request ? json_dumps(request, JSON_COMPACT) : NULL;
	char url[320];
	enum kme_status status = KME_OK;
	struct curl_header *header;
	const char *reason = NULL;
	CURLcode err;
	long code = 0;

	json_decref(request);
	if (!body)
		return KME_UNAVAILABLE;
	snprintf(url, sizeof(url), "%s/kme.v1.KeyService/%s", c->base, method);
	c->size = 0;
	curl_easy_setopt(c->curl, CURLOPT_URL, url);
	curl_easy_setopt(c->curl, CURLOPT_POSTFIELDS, body);
	err = curl_easy_perform(c->curl);
	free(body);
	if (err) {
		LOG_E("kme: %s: %s", method, curl_easy_strerror(err));
		return KME_UNAVAILABLE;
	}
	curl_easy_getinfo(c->curl, CURLINFO_RESPONSE_CODE, &code);
	if (code != 200) {
		if (!curl_easy_header(c->curl, "Kme-Reason", 0, CURLH_HEADER, -1, &header) &&
		    only(header->value, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_", 1, 32))
			reason = header->value;
		status = kme_parse_reason(reason);
		if (status != KME_NOT_BOUND)
			LOG_N("kme: %s: HTTP %ld, %s", method, code, reason ? reason : "no reason");
	}
	return status;
}

enum kme_status kme_prepare(struct kme_caller *c, const char *imsi, const uint8_t rand[KME_RAND], struct kme_vector *out)
{
	enum kme_status status = KME_REFUSED;

	if (is_digits(imsi))
		status = call(c, "PrepareVector", json_pack("{s:s, s:o}", "imsi", imsi, "rand", base64(rand, KME_RAND)));
	return status ? status : kme_parse_vector(c->reply, c->size, out);
}

enum kme_status kme_restore(struct kme_caller *c, const char *imsi, uint8_t rand[KME_RAND])
{
	enum kme_status status = KME_REFUSED;
	json_t *root;

	if (is_digits(imsi))
		status = call(c, "RestoreRAND", json_pack("{s:s, s:o}", "imsi", imsi, "rand", base64(rand, KME_RAND)));
	if (status)
		return status;
	root = json_loadb(c->reply, c->size, JSON_REJECT_DUPLICATES, NULL);
	status = unbase64(json_object_get(root, "rand"), rand, KME_RAND) ? KME_OK : KME_UNAVAILABLE;
	json_decref(root);
	return status;
}

enum kme_status kme_report(struct kme_caller *c, const char *imsi)
{
	if (!is_digits(imsi))
		return KME_REFUSED;
	return call(c, "ReportAuthentication", json_pack("{s:s, s:b}", "imsi", imsi, "ok", 1));
}

enum kme_status kme_establish(struct kme_caller *c, const char *imsi, const char *imei, const char *attempt,
			      const uint8_t *payload, size_t size, uint8_t nw_sig[KME_NW_SIG])
{
	enum kme_status status = KME_REFUSED;

	if (is_digits(imsi) && is_digits(imei) && is_attempt(attempt) && size && size <= MAX_PAYLOAD)
		status = call(c, "EstablishKME", json_pack("{s:s, s:s, s:s, s:o}", "imsi", imsi, "imei", imei,
							   "attempt_id", attempt, "payload", base64(payload, size)));
	return status ? status : kme_parse_nw_sig(c->reply, c->size, nw_sig);
}
