/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kme.fdx: KME binding (3GPP TR 33.868, 5.4.4.2.3.3.3) for S6a, as an extension of freeDiameter. See ../../docs/s6a.md.
 *
 * It does the same in an HSS, beside its own S6a handlers, and in an agent between MME and HSS, and needs not be told
 * which: what is for a local application comes by the dispatcher, what is forwarded by the router.
 *
 *   request for this host   on_local takes it    -> worker: request()  -> the host's handler, in the worker
 *   request that passes     on_request takes it  -> worker: request()  -> sent on
 *   answer that passes      on_answer takes it   -> worker: answer()   -> sent on
 *   answer of this host     tap takes it         -> worker: answer()   -> sent
 *
 * The host's own threads only hand messages over. A worker waits for the key service, for as long as the time-out says.
 * Messages belong to whoever holds the pointer; a message that is handed over is gone from where it was.
 */
#include <curl/curl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "dict.h"
#include "service.h"

#define MAX_WORKERS	64
#define MAX_OPEN	32
#define MAX_VECTORS	32	/* an HSS answers 5 at most (TS 29.272, 7.3.11) */
#define RESYNC_INFO	30	/* RAND || AUTS (TS 29.272, 7.3.15) */

#define SESSION_ID	263u	/* RFC 6733, 8.8 */
#define PROXY_INFO	284u	/* RFC 6733, 6.7.2 to 6.7.4 */
#define PROXY_HOST	280u
#define PROXY_STATE	33u

/* Binding-Control */
#define PROVISIONING_ONLY	(1u << 0)
#define PREPROCESSED		(1u << 1)

/* Result codes of TS 29.272, 7.4, which travel as Experimental-Result. */
#define UNKNOWN_EPS_SUBSCRIPTION		5420
#define AUTHENTICATION_DATA_UNAVAILABLE	4181

enum rejected { REJECT_UNKNOWN, REJECT_AUTHORIZATION, PROVISION };

static struct {
	struct kme_service service;
	char *text;			/* the configuration file, which the strings point into */
	uint32_t vendor;
	int workers, queue;
	enum rejected rejected;
	const char *open[MAX_OPEN];	/* IMSIs that begin like this pass while the service is away */
	int opens;
} conf = { .service.timeout_ms = 2000, .vendor = VENDOR_OWN, .workers = 8, .queue = 1000 };

enum counter { PREPARED, RESTORED, ESTABLISHED, REPORTED, REFUSED, UNAVAILABLE, PASSED_OPEN, OVERLOADED, MALFORMED, COUNTERS };
static const char *const counter_names[COUNTERS] = { "prepared", "restored", "established", "reported", "refused",
	"unavailable", "passed-open", "overloaded", "malformed" };
static atomic_ulong counters[COUNTERS];

static void count(enum counter c)
{
	atomic_fetch_add_explicit(&counters[c], 1, memory_order_relaxed);
}

static void count_outcome(enum kme_status status, enum counter done)
{
	count(status == KME_OK ? done : status == KME_UNAVAILABLE ? UNAVAILABLE : REFUSED);
}

enum kind { REQUEST_LOCAL, REQUEST_PASSING, ANSWER };

struct job {
	enum kind kind;
	struct msg *msg;	/* NULL ends a worker */
};

/* Not in the headers: the queue of all that is sent. A weak symbol, so that a host without it can be told. */
extern struct fifo *fd_g_outgoing __attribute__((weak));

static struct fifo *jobs, *tap;
static struct fifo *_Atomic outgoing;	/* the real one, while the tap is in its place */
static char tap_end;	/* its address ends the tap's thread */
static pthread_t workers[MAX_WORKERS], tap_thread, teller;
static int started, tapping, telling;
static atomic_int stopping;	/* set by the host, read by all threads of ours */
static pthread_mutex_t tell_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t tell = PTHREAD_COND_INITIALIZER;
static struct disp_hdl *local_handle;
static struct fd_rt_fwd_hdl *request_handle, *answer_handle;
static struct dict_object *a_proxy_info, *a_proxy_host, *a_proxy_state;
static __thread int in_worker;	/* the dispatcher is called by a worker: the message has been seen to */

static int is_s6a(struct msg *m, int request)
{
	struct msg_hdr *h;

	return !fd_msg_hdr(m, &h) && h->msg_appl == S6A_APP && (h->msg_code == CMD_AIR || h->msg_code == CMD_ULR) &&
	       !!(h->msg_flags & CMD_FLAG_REQUEST) == request;
}

static uint32_t command(struct msg *m)
{
	struct msg_hdr *h;

	return fd_msg_hdr(m, &h) ? 0 : h->msg_code;
}

/*
 * fd_msg_parse_dict() of a group with a damaged AVP in it leaves it half parsed, and what is sent on is cut short. So
 * what we parse ourselves, that which passes, is looked through first.
 */
static int well_formed(const uint8_t *p, size_t n, int depth)
{
	while (n) {
		size_t head, size;
		uint32_t code, vendor = 0;

		if (n < 8)
			return 0;
		head = p[4] & AVP_FLAG_VENDOR ? 12 : 8;
		size = (size_t)p[5] << 16 | (size_t)p[6] << 8 | p[7];
		if (size < head || size > n)
			return 0;
		code = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
		if (head == 12)
			vendor = (uint32_t)p[8] << 24 | (uint32_t)p[9] << 16 | (uint32_t)p[10] << 8 | p[11];
		if (depth < 3 &&
		    ((!vendor && code == PROXY_INFO) ||
		     (vendor == VENDOR_3GPP && (code == TGPP_REQUESTED_EUTRAN || code == TGPP_TERMINAL_INFORMATION ||
						code == TGPP_AUTHENTICATION_INFO || code == TGPP_EUTRAN_VECTOR)) ||
		     (vendor == own_vendor_id && (code == OWN_BINDING_REQUEST || code == OWN_BINDING_ANSWER))) &&
		    !well_formed(p + head, size - head, depth + 1))
			return 0;
		size = (size + 3) & ~(size_t)3;
		if (size > n)
			size = n;
		p += size;
		n -= size;
	}
	return 1;
}

static int message_well_formed(struct msg *m)
{
	uint8_t *bytes = NULL;
	size_t size = 0;
	int ok;

	if (fd_msg_bufferize(m, &bytes, &size))
		return 0;
	ok = size >= 20 && well_formed(bytes + 20, size - 20, 0);
	free(bytes);
	return ok;
}

/* Parses an AVP with all that is in it, by the dictionary. */
static int parse(struct avp *a)
{
	struct fd_pei pei;

	memset(&pei, 0, sizeof(pei));
	if (!fd_msg_parse_dict(a, fd_g_config->cnf_dict, &pei))
		return 1;
	if (pei.pei_avp_free)
		fd_msg_free(pei.pei_avp);
	return 0;
}

/* A child, parsed. Of what passes, only the top level is parsed, and not even its values. */
static struct avp *parsed(msg_or_avp *parent, uint32_t vendor, uint32_t code)
{
	struct avp *a = child(parent, vendor, code);

	return a && parse(a) ? a : NULL;
}

/* The text in an AVP; empty if there is none, or it is not one of size digits. */
static void digits(struct avp *a, char *out, size_t room)
{
	size_t size, i;
	uint8_t *s = octets(a, &size);

	*out = 0;
	if (!s || size >= room)
		return;
	for (i = 0; i < size; i++)
		if (s[i] < '0' || s[i] > '9')
			return;
	memcpy(out, s, size);
	out[size] = 0;
}

static void imsi_of(struct msg *request, char imsi[16])
{
	digits(parsed(request, 0, BASE_USER_NAME), imsi, 16);
}

static int is_open(const char *imsi)
{
	int i;

	for (i = 0; i < conf.opens; i++)
		if (!strncmp(imsi, conf.open[i], strlen(conf.open[i])))
			return 1;
	return 0;
}

/* whether a message of this IMSI passes though the service could not be asked */
static int passes(const char *imsi)
{
	if (!is_open(imsi))
		return 0;
	count(PASSED_OPEN);
	return 1;
}

static void drop_all(msg_or_avp *parent, uint32_t vendor, uint32_t code)
{
	struct avp *a;

	while ((a = child(parent, vendor, code)))
		if (fd_msg_free(a))
			return;
}

static int add_result(struct msg *m, uint32_t experimental)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_experimental_result, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, VENDOR_3GPP));
	return add_u32(group, a_experimental_result_code, experimental);
}

/* An AVP of the base protocol that has a value, or children, as the dictionary wants them. */
static int sound(struct avp *a)
{
	struct avp_hdr *h;

	return !fd_msg_avp_hdr(a, &h) && !(h->avp_flags & AVP_FLAG_VENDOR) && parse(a) && (h->avp_code == PROXY_INFO || h->avp_value);
}

/* 1.2.1 ends the process over a Session-Id with the V bit in a request that it has only passed on so far. */
static void drop_unsound_session(struct msg *m)
{
	struct avp *a;

	while ((a = child(m, 0, SESSION_ID)) && !sound(a))
		if (fd_msg_free(a))
			return;
}

/* What proxies want back (RFC 6733, 6.2). The library's own way of it leaks when a Proxy-Info is damaged. */
static int add_proxies(struct msg *m)
{
	struct msg *request = NULL;
	struct avp *a, *group;
	uint8_t *host, *state;
	size_t host_size, state_size;

	CHECK_FCT(fd_msg_answ_getq(m, &request));
	for (a = child(request, 0, PROXY_INFO); a; a = next(a, 0, PROXY_INFO)) {
		if (!sound(a) || !(host = octets(child(a, 0, PROXY_HOST), &host_size)) || !(state = octets(child(a, 0, PROXY_STATE), &state_size)))
			continue;
		CHECK_FCT(add_group(m, a_proxy_info, &group));
		CHECK_FCT(add_octets(group, a_proxy_host, host, host_size));
		CHECK_FCT(add_octets(group, a_proxy_state, state, state_size));
	}
	return 0;
}

/* Makes the answer to a request: with a result of RFC 6733 by its name, or one of 3GPP's. */
static int refuse(struct msg **m, const char *name, uint32_t experimental)
{
	int err;

	drop_unsound_session(*m);
	err = fd_msg_new_answer_from_req(fd_g_config->cnf_dict, m, MSGFL_ANSW_NOPROXYINFO);
	if (!err)
		err = add_proxies(*m);
	if (!err && name)
		err = fd_msg_rescode_set(*m, (char *)name, NULL, NULL, 1);
	else if (!err && !(err = fd_msg_add_origin(*m, 0)))
		err = add_result(*m, experimental);
	return err;
}

/* AIA and ULA say that there is somebody who knows binding (TS 29.229, 6.3.29). */
static int add_support(struct msg *m)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_supported_features, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, own_vendor_id));
	CHECK_FCT(add_u32(group, a_feature_list_id, 1));
	return add_u32(group, a_feature_list, 1);
}

static int add_binding_answer(struct msg *m, enum kme_status status, const uint8_t *nw_sig)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_binding_answer, &group));
	if (nw_sig)
		CHECK_FCT(add_octets(group, a_nw_sig, nw_sig, KME_NW_SIG));
	return add_u32(group, a_binding_status, status);
}

/* The answer to a request with something of ours in it that cannot be read. */
static int malformed(struct msg **m)
{
	count(MALFORMED);
	return refuse(m, "DIAMETER_INVALID_AVP_LENGTH", 0) ? -1 : 1;
}

/* AIR: what the MME sends back for resynchronisation is the RAND that it got; the HSS needs the one that it made. */
static int authentication_request(struct kme_caller *c, struct msg **m)
{
	struct avp *eutran = parsed(*m, VENDOR_3GPP, TGPP_REQUESTED_EUTRAN);
	size_t size;
	uint8_t *info = octets(child(eutran, VENDOR_3GPP, TGPP_RESYNC_INFO), &size);
	enum kme_status status;
	char imsi[16];

	if (!eutran && child(*m, VENDOR_3GPP, TGPP_REQUESTED_EUTRAN))
		return malformed(m);
	if (!info || size != RESYNC_INFO)
		return 0;	/* none, or one that the HSS will refuse */
	imsi_of(*m, imsi);
	status = kme_restore(c, imsi, info);
	if (status == KME_NOT_BOUND)
		return 0;	/* its RANDs go out as the HSS makes them */
	count_outcome(status, RESTORED);
	if (status == KME_OK || passes(imsi))
		return 0;
	return refuse(m, NULL, AUTHENTICATION_DATA_UNAVAILABLE) ? -1 : 1;
}

static enum kme_status establish(struct kme_caller *c, struct msg *m, struct avp *binding, const char *imsi, uint8_t nw_sig[KME_NW_SIG])
{
	struct avp *terminal = parsed(m, VENDOR_3GPP, TGPP_TERMINAL_INFORMATION);
	char imei[17], attempt[KME_ATTEMPT + 1] = "";
	size_t size, attempt_size;
	uint8_t *payload = octets(child(binding, own_vendor_id, OWN_BINDING_PAYLOAD), &size);
	uint8_t *id = octets(child(binding, own_vendor_id, OWN_BINDING_ATTEMPT), &attempt_size);

	digits(child(terminal, VENDOR_3GPP, TGPP_IMEI), imei, sizeof(imei));
	if (!payload || !id || attempt_size > KME_ATTEMPT || memchr(id, 0, attempt_size))
		return KME_REFUSED;
	memcpy(attempt, id, attempt_size);
	return kme_establish(c, imsi, imei, attempt, payload, size, nw_sig);
}

/*
 * ULR. What came of a payload stands in the request from here on, in the place of the payload: the answer finds it there,
 * since freeDiameter keeps the request of an answer that is awaited.
 */
static int location_request(struct kme_caller *c, struct msg **m)
{
	struct avp *binding = parsed(*m, own_vendor_id, OWN_BINDING_REQUEST);
	uint8_t nw_sig[KME_NW_SIG];
	enum kme_status status;
	char imsi[16];

	if (!binding && child(*m, own_vendor_id, OWN_BINDING_REQUEST))
		return malformed(m);
	drop_all(*m, own_vendor_id, OWN_BINDING_ANSWER);	/* nobody else's */
	imsi_of(*m, imsi);
	if (!binding) {
		/* AKA has succeeded, or the MME would not update the location. */
		status = kme_report(c, imsi);
		if (status != KME_NOT_BOUND)
			count_outcome(status, REPORTED);
		if (status != KME_UNAVAILABLE || passes(imsi))
			return 0;
		return refuse(m, "DIAMETER_UNABLE_TO_COMPLY", 0) ? -1 : 1;
	}
	status = establish(c, *m, binding, imsi, nw_sig);
	count_outcome(status, ESTABLISHED);
	if (status == KME_OK || (status == KME_UNAVAILABLE ? passes(imsi) : conf.rejected == PROVISION)) {
		drop_all(*m, own_vendor_id, OWN_BINDING_REQUEST);
		return add_binding_answer(*m, status, status == KME_OK ? nw_sig : NULL) ? -1 : 0;
	}
	if (status == KME_UNAVAILABLE || conf.rejected == REJECT_AUTHORIZATION) {
		if (refuse(m, status == KME_UNAVAILABLE ? "DIAMETER_UNABLE_TO_COMPLY" : "DIAMETER_AUTHORIZATION_REJECTED", 0))
			return -1;
	} else if (refuse(m, NULL, UNKNOWN_EPS_SUBSCRIPTION)) {
		return -1;
	}
	return add_support(*m) || add_binding_answer(*m, status, NULL) ? -1 : 1;
}

/* 0: the request goes on; 1: *m is its answer; -1: neither, for want of memory. */
static int request(struct kme_caller *c, struct msg **m)
{
	return command(*m) == CMD_AIR ? authentication_request(c, m) : location_request(c, m);
}

/* A request that nobody has looked through yet. */
static int unseen_request(struct kme_caller *c, struct msg **m)
{
	return message_well_formed(*m) ? request(c, m) : malformed(m);
}

/* Prepares the vectors of an AIA, all or none. */
static enum kme_status prepare(struct kme_caller *c, struct avp *info, const char *imsi, uint32_t *control, char attempt[KME_ATTEMPT + 1])
{
	static const uint32_t bits[] = { PREPROCESSED, PROVISIONING_ONLY };
	struct kme_vector vectors[MAX_VECTORS];
	uint8_t *rands[MAX_VECTORS];
	struct avp *v;
	size_t size;
	int n = 0, i;

	*control = 0;
	for (v = child(info, VENDOR_3GPP, TGPP_EUTRAN_VECTOR); v; v = next(v, VENDOR_3GPP, TGPP_EUTRAN_VECTOR)) {
		if (n == MAX_VECTORS || !(rands[n] = octets(child(v, VENDOR_3GPP, TGPP_RAND), &size)) || size != KME_RAND)
			return KME_REFUSED;
		n++;
	}
	for (i = 0; i < n; i++) {
		enum kme_status status = kme_prepare(c, imsi, rands[i], &vectors[i]);
		uint32_t bit;

		if (status)
			return status;
		bit = bits[!!*vectors[i].attempt];
		if (*control && *control != bit)
			return KME_UNAVAILABLE;	/* bound in between: the next request finds it so */
		*control = bit;
	}
	for (i = 0; i < n; i++)
		memcpy(rands[i], vectors[i].rand, KME_RAND);
	if (n)
		memcpy(attempt, vectors[n - 1].attempt, KME_ATTEMPT + 1);
	return KME_OK;
}

/* A vector that was not prepared leaves for nobody. */
static int withhold(struct msg *m)
{
	drop_all(m, VENDOR_3GPP, TGPP_AUTHENTICATION_INFO);
	drop_all(m, 0, BASE_RESULT_CODE);
	return add_result(m, AUTHENTICATION_DATA_UNAVAILABLE);
}

static int authentication_answer(struct kme_caller *c, struct msg *m, struct msg *request)
{
	struct avp *info;
	enum kme_status status;
	uint32_t control = 0;
	char imsi[16], attempt[KME_ATTEMPT + 1] = "";

	if (child(m, own_vendor_id, OWN_BINDING_CONTROL) || !child(m, VENDOR_3GPP, TGPP_AUTHENTICATION_INFO))
		return 0;	/* another of us was here, or there are no vectors */
	imsi_of(request, imsi);
	info = message_well_formed(m) ? parsed(m, VENDOR_3GPP, TGPP_AUTHENTICATION_INFO) : NULL;
	status = info ? prepare(c, info, imsi, &control, attempt) : KME_REFUSED;
	if (status == KME_OK && !control)
		return 0;	/* vectors of other kinds only */
	count_outcome(status, PREPARED);
	if (status == KME_OK) {
		CHECK_FCT(add_support(m));
		CHECK_FCT(add_u32(m, a_binding_control, control));
		return *attempt ? add_octets(m, a_binding_attempt, attempt, strlen(attempt)) : 0;
	}
	if (status == KME_UNAVAILABLE && passes(imsi))
		return 0;
	return withhold(m);
}

static int location_answer(struct msg *m, struct msg *request)
{
	struct avp *noted = child(request, own_vendor_id, OWN_BINDING_ANSWER);
	uint32_t status;
	uint8_t *nw_sig;
	size_t size;

	drop_all(m, own_vendor_id, OWN_BINDING_ANSWER);
	if (!noted || !u32_of(child(noted, own_vendor_id, OWN_BINDING_STATUS), &status))
		return 0;
	nw_sig = octets(child(noted, own_vendor_id, OWN_NW_SIG), &size);
	CHECK_FCT(add_support(m));
	return add_binding_answer(m, status, size == KME_NW_SIG ? nw_sig : NULL);
}

static int answer(struct kme_caller *c, struct msg *m)
{
	struct msg *request = NULL;

	if (fd_msg_answ_getq(m, &request) || !request)
		return 0;
	return command(m) == CMD_AIR ? authentication_answer(c, m, request) : location_answer(m, request);
}

/* Sends past the tap. It does not wait for room: there are no more messages than jobs, and at the end nobody makes room. */
static void send_on(struct msg *m)
{
	struct fifo *queue = outgoing;

	if (!m)
		return;
	if (stopping || (queue ? fd_fifo_post_noblock(queue, (void *)&m) : fd_msg_send(&m, NULL, NULL)))
		fd_msg_free(m);
}

/* Has the host's handler answer, as the dispatcher would have. What it sends itself comes by the tap. */
static void dispatch(struct kme_caller *c, struct msg *m)
{
	struct session *session = NULL;
	enum disp_action action;
	char *code = NULL, *text = NULL;
	struct msg *dropped = NULL;

	if (fd_msg_sess_get(fd_g_config->cnf_dict, m, &session, NULL))
		session = NULL;
	in_worker = 1;
	CHECK_FCT_DO(fd_msg_dispatch(&m, session, &action, &code, &text, &dropped), );
	in_worker = 0;
	if (!m) {
		if (dropped)
			fd_msg_free(dropped);
		return;
	}
	if (action != DISP_ACT_SEND && refuse(&m, action == DISP_ACT_CONT ? "DIAMETER_COMMAND_UNSUPPORTED" : code ? code : "DIAMETER_UNABLE_TO_COMPLY", 0)) {
		fd_msg_free(m);
		return;
	}
	if (is_s6a(m, 0) && answer(c, m)) {
		fd_msg_free(m);
		return;
	}
	send_on(m);
}

static void work(struct kme_caller *c, enum kind kind, struct msg *m)
{
	int done;

	if (kind == ANSWER) {
		if (answer(c, m))
			fd_msg_free(m);	/* half of what it should be: the request runs into its time-out */
		else
			send_on(m);
		return;
	}
	done = kind == REQUEST_PASSING ? unseen_request(c, &m) : request(c, &m);
	if (done < 0 || stopping)	/* the handlers may have ended meanwhile */
		fd_msg_free(m);
	else if (!done && kind == REQUEST_LOCAL)
		dispatch(c, m);
	else
		send_on(m);
}

static void *worker(void *arg)
{
	struct kme_caller *c = arg;
	struct job *j;

	fd_log_threadname("kme worker");
	while (!fd_fifo_get(jobs, &j)) {
		struct job job = *j;

		free(j);
		if (!job.msg)
			break;
		if (stopping)
			fd_msg_free(job.msg);
		else
			work(c, job.kind, job.msg);
	}
	kme_caller_free(c);
	return NULL;
}

/* Takes the message; or leaves it where there is no room for it. */
static int hand_over(enum kind kind, struct msg **m)
{
	struct job *j;

	if (stopping || fd_fifo_length(jobs) >= conf.queue || !(j = malloc(sizeof(*j)))) {
		count(OVERLOADED);
		return 0;
	}
	j->kind = kind;
	j->msg = *m;
	if (fd_fifo_post_noblock(jobs, (void *)&j)) {
		free(j);
		return 0;
	}
	*m = NULL;
	return 1;
}

/* With all workers busy and the queue full: as if the service was away. */
static void overflow_request(struct msg **m)
{
	char imsi[16];

	imsi_of(*m, imsi);
	if (passes(imsi))
		return;
	if (refuse(m, "DIAMETER_TOO_BUSY", 0))
		fd_msg_free(*m);
	else
		send_on(*m);
	*m = NULL;
}

static void overflow_answer(struct msg **m)
{
	struct msg *request = NULL;
	char imsi[16] = "";

	if (!fd_msg_answ_getq(*m, &request) && request)
		imsi_of(request, imsi);
	if (command(*m) == CMD_ULR || passes(imsi))
		return;
	if (withhold(*m)) {
		fd_msg_free(*m);
		*m = NULL;
	}
}

static void *tap_run(void *arg)
{
	struct msg *m, *request;
	DiamId_t source;

	fd_log_threadname("kme tap");
	while (!fd_fifo_get(tap, &m) && (void *)m != &tap_end) {
		source = NULL;
		request = NULL;
		/* An answer that has a source passes; on_answer has had it. */
		if (is_s6a(m, 0) && !fd_msg_source_get(m, &source, NULL) && !source && !fd_msg_answ_getq(m, &request) && request) {
			if (!hand_over(ANSWER, &m))
				overflow_answer(&m);
		}
		send_on(m);
	}
	return NULL;
}

static void nothing(struct fifo *queue, void **data)
{
}

/*
 * There is no public way to hold an answer of a local application back: the hook before sending can only block the one
 * thread that sends everything. So the handlers' answers are taken from a queue of ours. Not before the first request:
 * by then the thread that empties the real queue has it.
 */
static void tap_start(void)
{
	if (!&fd_g_outgoing) {
		LOG_F("kme: this freeDiameter does not let the answers of its own applications be changed: load kme.fdx in an agent before it");
		return;
	}
	/* A queue with a threshold is not destroyed by the core, which does not know that we still wait at it. */
	if (fd_fifo_new(&tap, 30) || fd_fifo_setthrhd(tap, &tap_end, UINT16_MAX, nothing, 0, nothing))
		return;
	outgoing = fd_g_outgoing;
	if (pthread_create(&tap_thread, NULL, tap_run, NULL)) {
		outgoing = NULL;
		return;
	}
	tapping = 1;
	__atomic_store_n(&fd_g_outgoing, tap, __ATOMIC_SEQ_CST);
}

static int on_local(struct msg **m, struct avp *avp, struct session *session, void *data, enum disp_action *action)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	if (in_worker || !is_s6a(*m, 1))
		return 0;
	pthread_once(&once, tap_start);
	if (!tapping) {	/* its answers would leave as they are */
		if (refuse(m, "DIAMETER_UNABLE_TO_COMPLY", 0)) {	/* an error from here would end the daemon */
			fd_msg_free(*m);
			*m = NULL;
		}
		*action = DISP_ACT_SEND;
		return 0;
	}
	if (!hand_over(REQUEST_LOCAL, m))
		overflow_request(m);
	return 0;
}

static int on_request(void *data, struct msg **m)
{
	if (is_s6a(*m, 1) && !hand_over(REQUEST_PASSING, m))
		overflow_request(m);
	return 0;
}

static int on_answer(void *data, struct msg **m)
{
	struct msg *request = NULL;
	DiamId_t source = NULL;

	/* An answer to what this host has asked itself is none of ours. */
	if (is_s6a(*m, 0) && !fd_msg_answ_getq(*m, &request) && request && !fd_msg_source_get(request, &source, NULL) && source && !hand_over(ANSWER, m))
		overflow_answer(m);
	return 0;
}

static void tell_counters(void)
{
	static unsigned long told[COUNTERS];
	char line[512] = "";
	size_t used = 0;
	int i, changed = 0;

	for (i = 0; i < COUNTERS; i++) {
		unsigned long now = atomic_load_explicit(&counters[i], memory_order_relaxed);

		changed |= told[i] != now;
		told[i] = now;
	}
	if (!changed)
		return;
	for (i = 0; i < COUNTERS && used < sizeof(line); i++)
		used += (size_t)snprintf(line + used, sizeof(line) - used, " %s %lu", counter_names[i], told[i]);
	LOG_N("kme:%s", line);
}

/* Says once a minute what has been done. */
static void *tell_run(void *arg)
{
	struct timespec next;

	pthread_mutex_lock(&tell_lock);
	while (!stopping) {
		clock_gettime(CLOCK_REALTIME, &next);
		next.tv_sec += 60;
		if (pthread_cond_timedwait(&tell, &tell_lock, &next) == ETIMEDOUT)
			tell_counters();
	}
	pthread_mutex_unlock(&tell_lock);
	return NULL;
}

static int number(const char *key, const char *text, long low, long high, long *out)
{
	char *end;
	long n = strtol(text, &end, 10);

	if (!*text || *end || n < low || n > high) {
		LOG_F("kme: %s is a number from %ld to %ld, not \"%s\"", key, low, high, text);
		return EINVAL;
	}
	*out = n;
	return 0;
}

static int set(char *key, char *value)
{
	static const char *const rejected[] = { "unknown-subscription", "authorization-rejected", "provision" };
	const struct {
		const char *key;
		const char **to;
	} texts[] = { { "service", &conf.service.url }, { "ca", &conf.service.ca }, { "cert", &conf.service.cert }, { "key", &conf.service.key } };
	long n;
	size_t i;

	for (i = 0; i < sizeof(texts) / sizeof(*texts); i++)
		if (!strcmp(key, texts[i].key)) {
			*texts[i].to = value;
			return 0;
		}
	if (!strcmp(key, "rejected")) {
		for (i = 0; i < 3; i++)
			if (!strcmp(value, rejected[i])) {
				conf.rejected = (enum rejected)i;
				return 0;
			}
		LOG_F("kme: rejected is unknown-subscription, authorization-rejected or provision, not \"%s\"", value);
		return EINVAL;
	}
	if (!strcmp(key, "open")) {
		if (conf.opens == MAX_OPEN || strspn(value, "0123456789") != strlen(value) || strlen(value) < 5) {
			LOG_F("kme: open is the beginning of IMSIs, at least MCC and MNC, %d of them at most: \"%s\"", MAX_OPEN, value);
			return EINVAL;
		}
		conf.open[conf.opens++] = value;
		return 0;
	}
	if (!strcmp(key, "vendor")) {
		CHECK_FCT(number(key, value, 1, 0xffffffffL, &n));
		conf.vendor = (uint32_t)n;
	} else if (!strcmp(key, "timeout_ms")) {
		CHECK_FCT(number(key, value, 10, 60000, &conf.service.timeout_ms));
	} else if (!strcmp(key, "workers")) {
		CHECK_FCT(number(key, value, 1, MAX_WORKERS, &n));
		conf.workers = (int)n;
	} else if (!strcmp(key, "queue")) {
		CHECK_FCT(number(key, value, 1, 100000, &n));
		conf.queue = (int)n;
	} else {
		LOG_F("kme: there is no setting \"%s\"", key);
		return EINVAL;
	}
	return 0;
}

static char *trim(char *s)
{
	char *end;

	s += strspn(s, " \t\r\n");
	end = s + strlen(s);
	while (end > s && strchr(" \t\r\n", end[-1]))
		*--end = 0;
	return s;
}

/* A line a setting, "key = value"; # begins a comment. */
static int read_conf(const char *path)
{
	FILE *f = path ? fopen(path, "re") : NULL;
	char *line, *rest;
	size_t size;

	if (!f) {
		LOG_F("kme: the configuration %s cannot be read: LoadExtension = \"kme.fdx\" : \"/path/of/kme.conf\";", path ? path : "(none)");
		return EINVAL;
	}
	conf.text = calloc(1, 65537);
	size = conf.text ? fread(conf.text, 1, 65536, f) : 0;
	fclose(f);
	if (!conf.text || size == 65536 || strlen(conf.text) != size) {
		LOG_F("kme: %s is no configuration", path);
		return EINVAL;
	}
	for (line = strtok_r(conf.text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		char *value;

		line[strcspn(line, "#")] = 0;
		line = trim(line);
		if (!*line)
			continue;
		if (!(value = strchr(line, '='))) {
			LOG_F("kme: %s: \"%s\" is not key = value", path, line);
			return EINVAL;
		}
		*value++ = 0;
		CHECK_FCT(set(trim(line), trim(value)));
	}
	if (!conf.service.url || strlen(conf.service.url) > 200 || (strncmp(conf.service.url, "unix:/", 6) && strncmp(conf.service.url, "https://", 8))) {
		LOG_F("kme: %s: service is https://HOST:PORT or unix:/PATH", path);
		return EINVAL;
	}
	if (!strncmp(conf.service.url, "https:", 6) && (!conf.service.ca || !conf.service.cert || !conf.service.key)) {
		LOG_F("kme: %s: https needs ca, cert and key, the files of mutual TLS", path);
		return EINVAL;
	}
	return 0;
}

static int dictionary(void)
{
	CHECK_FCT(s6a_dict(conf.vendor));
	CHECK_FCT(dict_find(0, PROXY_INFO, &a_proxy_info));
	CHECK_FCT(dict_find(0, PROXY_HOST, &a_proxy_host));
	CHECK_FCT(dict_find(0, PROXY_STATE, &a_proxy_state));
	return a_proxy_info && a_proxy_host && a_proxy_state ? 0 : ENOENT;	/* the base protocol's: they are there */
}

static int kme_entry(char *path)
{
	CHECK_FCT(read_conf(path));
	CHECK_FCT(dictionary());
	if (curl_global_init(CURL_GLOBAL_DEFAULT))
		return ENOMEM;
	CHECK_FCT(fd_fifo_new(&jobs, 0));
	while (started < conf.workers) {
		struct kme_caller *c = kme_caller_new(&conf.service);

		if (!c)
			return ENOMEM;
		CHECK_POSIX_DO(pthread_create(&workers[started], NULL, worker, c), { kme_caller_free(c); return ENOMEM; });
		started++;
	}
	CHECK_POSIX(pthread_create(&teller, NULL, tell_run, NULL));
	telling = 1;
	CHECK_FCT(fd_disp_register(on_local, DISP_HOW_ANY, NULL, NULL, &local_handle));
	CHECK_FCT(fd_rt_fwd_register(on_request, NULL, RT_FWD_REQ, &request_handle));
	CHECK_FCT(fd_rt_fwd_register(on_answer, NULL, RT_FWD_ANS, &answer_handle));
	LOG_N("kme: %s, vendor %u, %d workers, time-out %ld ms, %d ranges fail open", conf.service.url, conf.vendor, conf.workers, conf.service.timeout_ms, conf.opens);
	return 0;
}

void fd_ext_fini(void)
{
	struct fifo *queue;
	struct job *j;
	struct msg *m;
	int i;

	stopping = 1;
	if (local_handle)
		fd_disp_unregister(&local_handle, NULL);
	if (request_handle)
		fd_rt_fwd_unregister(request_handle, NULL);
	if (answer_handle)
		fd_rt_fwd_unregister(answer_handle, NULL);
	for (i = 0; i < started; i++)
		if ((j = calloc(1, sizeof(*j))))
			fd_fifo_post_noblock(jobs, (void *)&j);
	for (i = 0; i < started; i++)
		pthread_join(workers[i], NULL);
	if (tapping) {
		void *end = &tap_end;

		fd_fifo_post_noblock(tap, &end);
		pthread_join(tap_thread, NULL);
	}
	if (telling) {
		pthread_mutex_lock(&tell_lock);
		pthread_cond_signal(&tell);
		pthread_mutex_unlock(&tell_lock);
		pthread_join(teller, NULL);
	}
	tell_counters();
	while (jobs && !fd_fifo_tryget(jobs, &j)) {
		if (j->msg)
			fd_msg_free(j->msg);
		free(j);
	}
	if (jobs)
		fd_fifo_del(&jobs);
	queue = outgoing;
	while (queue && !fd_fifo_tryget(queue, &m))
		fd_msg_free(m);
	if (queue)
		fd_fifo_del(&queue);
	curl_global_cleanup();
	free(conf.text);
}

EXTENSION_ENTRY("kme", kme_entry);
