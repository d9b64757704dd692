/* SPDX-License-Identifier: Apache-2.0 */
/* Calls of kme.v1.KeyService over HTTP/JSON. See ../../api/kme/v1/kme.proto. */
#ifndef KME_SERVICE_H
#define KME_SERVICE_H

#include <stddef.h>
#include <stdint.h>

#define KME_RAND	16
#define KME_NW_SIG	32
#define KME_ATTEMPT	64	/* the longest attempt id that is taken */

/* Binding-Status: what became of a call. */
enum kme_status {
	KME_OK = 0,
	KME_REFUSED = 1,	/* the payload, the device or the subscription: the same again will not do */
	KME_NO_ATTEMPT = 2,	/* none is open: a new vector opens one */
	KME_UNAVAILABLE = 3,	/* the service is away, slow or overloaded: later, maybe */
	KME_NOT_BOUND = 4,	/* never on the wire */
};

struct kme_service {
	const char *url;		/* https://host:port, or unix:/path */
	const char *ca, *cert, *key;	/* PEM files, for https */
	long timeout_ms;
};

struct kme_vector {
	uint8_t rand[KME_RAND];
	char attempt[KME_ATTEMPT + 1];	/* empty: RAND is encrypted under the KME */
};

/* A caller is one thread's connection to the service. NULL when memory is short. */
struct kme_caller;
struct kme_caller *kme_caller_new(const struct kme_service *service);
void kme_caller_free(struct kme_caller *c);

/* The text of an identity is checked: digits only for IMSI and IMEI, base64url for an attempt. */
enum kme_status kme_prepare(struct kme_caller *c, const char *imsi, const uint8_t rand[KME_RAND], struct kme_vector *out);
enum kme_status kme_restore(struct kme_caller *c, const char *imsi, uint8_t rand[KME_RAND]);
enum kme_status kme_report(struct kme_caller *c, const char *imsi);
enum kme_status kme_establish(struct kme_caller *c, const char *imsi, const char *imei, const char *attempt,
			      const uint8_t *payload, size_t size, uint8_t nw_sig[KME_NW_SIG]);

/* What a reply says. A refusal has its reason in the header Kme-Reason; NULL is none. For tests and fuzzing too. */
enum kme_status kme_parse_vector(const char *json, size_t size, struct kme_vector *out);
enum kme_status kme_parse_nw_sig(const char *json, size_t size, uint8_t nw_sig[KME_NW_SIG]);
enum kme_status kme_parse_reason(const char *reason);

#endif
