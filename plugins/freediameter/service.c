/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "stream.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <freeDiameter/extension.h>

#define RETRY_MS	1000		/* how long the breaker stays open before one call tries again */

static const char *const methods[] = {
	"PrepareVector", "EstablishKME", "ReportAuthentication", "RestoreRAND", "GetBinding",
	"CheckEquipment",
};

struct kme_service service;
struct instance *instances;
static struct kme_call **by_id;		/* those under way, at id % service.calls */
static uint64_t earliest;		/* the earliest time-out among them */
static struct kme_call *ended, *last_ended;	/* whose done() must be called */
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

int kme_service_start(const struct kme_service *of)
{
	int i;

	service = *of;
	instances = calloc((size_t)service.n, sizeof(*instances));
	by_id = calloc((size_t)service.calls, sizeof(*by_id));
	if (!instances || !by_id) {
		service.n = 0;
		return ENOMEM;
	}
	for (i = 0; i < service.n; i++)
		instances[i].url = service.urls[i];
	return stream_start();
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

/* Ends a call that is under way: its done() will be called. */
static void end_call(struct kme_call *c)
{
	unlink_call(c);
	*(ended ? &last_ended->newer : &ended) = c;
	last_ended = c;
}

static void answered(struct kme_call *c)
{
	if (failures >= service.breaker)
		LOG_E("kme: %s answers again", c->at->url);
	failures = 0;
	end_call(c);
}

/* Stops calls to an instance until it says that it is ready, unless all others are away. */
static void leave(struct instance *i, const char *why)
{
	if (service.n == 1 || i->away)
		return;
	LOG_E("kme: %s: %s: it gets no calls until it is ready, unless all are away", i->url, why);
	i->away = 1;
	i->watch_at = kme_now();
}

/*
 * Any instance that was not tried for a call and is not away; if all are away, any that was not tried. NULL: there is
 * none. It is random: by turns, which may be in step with attaches, one instance could get all calls of a kind.
 */
static struct instance *pick(const struct kme_call *c)
{
	struct instance *picked = NULL;
	int all_away = 1, first = (int)(random() % service.n), n;

	for (n = 0; n < service.n; n++) {
		int at = (first + n) % service.n, made = !!(c->tried & 1u << at);
		struct instance *i = &instances[at];

		if (!made && !i->away)
			return i;
		all_away &= i->away;
		if (!made && !picked)
			picked = i;
	}
	return all_away ? picked : NULL;
}

static int is_text(const struct wire_in *i, const char *text)
{
	return i->data && i->size == strlen(text) && !memcmp(i->data, text, i->size);
}

/*
 * Handles an error of a call. It stops calls to an instance that has lost its HSM or its store, or was too slow, and
 * repeats the call at another one if it may.
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

int service_answer(struct instance *from, const uint8_t *data, size_t size)
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
		return 1;	/* it was given up */
	if (what == ANSWER_ERROR) {
		take_error(c, &answer);
		return 1;
	}
	if (what == FIRST_METHOD + (uint32_t)c->method)
		kme_parse(c->method, answer.at, (size_t)(answer.end - answer.at), c->asked, &c->reply);
	else
		kme_reply_is(&c->reply, KME_UNAVAILABLE, NO_ANSWER);
	answered(c);
	return 1;
}

/* 0: the reply is there. */
static int in_vain(struct kme_call *c, enum kme_status status, const char *why)
{
	kme_reply_is(&c->reply, status, why);
	return 0;
}

/* Makes a call at an instance. If another may be tried later, half of the time is left for it. 0: there is a reply. */
static int send_to(struct kme_call *c, struct instance *i)
{
	uint64_t now = kme_now(), left = c->deadline > now ? c->deadline - now : 1;

	c->tried |= 1u << (i - instances);
	if (!c->once && c->tried != (1u << service.n) - 1)
		left = (left + 1) / 2;
	if (!kme_write_call(c, left))
		return in_vain(c, KME_REFUSED, "MALFORMED");
	if (!i->stream && stream_open(i))
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
		stream_close(&instances[i]);
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
 * ended in order, or was not given it, it was not begun, and else it comes to the same, but for a report of a failure.
 * If the stream was refused, that is the answer to all calls.
 */
static void stream_ended(struct instance *i)
{
	const char *why = i->why ? i->why : "the stream has ended";
	struct kme_call *c, *newer, *last = i->newest, *unsent = i->unsent;
	int how = i->course, begun = how != IN_ORDER;
	long code = 0;

	curl_easy_getinfo(i->stream, CURLINFO_RESPONSE_CODE, &code);
	stream_close(i);
	if (last && how != TURNED_AWAY)
		leave(i, why);
	for (c = i->oldest; c && under_way; c = newer) {	/* a failure may end them all */
		struct instance *next = NULL;

		newer = c == last ? NULL : c->newer;
		if (c == unsent)
			begun = 0;
		if (how == TURNED_AWAY) {
			kme_parse_error(i->refusal, strlen(i->refusal), &c->reply);
			answered(c);
			continue;
		}
		if (!begun || !c->once)
			next = pick(c);
		if (!next && code == 200 && !c->again && (!begun || !c->once)) {
			c->again = 1;
			next = i;
		}
		if (!move(c, next))
			failed(c, why);
	}
}

/*
 * Calls that have waited long enough at an instance go to another one, if they may. If nothing at all came on the
 * stream meanwhile, it is ended: its instance may be ready, and the stream would stay open as long as calls are under
 * way.
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

void service_ready(struct instance *i)
{
	i->away = 0;
	failures = 0;
	LOG_E("kme: %s is ready again", i->url);
}

uint64_t service_due(void)
{
	return ended ? 0 : under_way ? earliest : UINT64_MAX;
}

void kme_turn(int wait_ms)
{
	uint64_t now = kme_now(), until = now + (uint64_t)wait_ms;
	struct instance *i, *end = instances + service.n;

	for (i = instances; i < end; i++) {
		if (!i->away || i->watch)
			continue;
		if (i->watch_at <= now)
			stream_watch(i);
		if (i->watch_at < until)
			until = i->watch_at;
	}
	streams_turn(until);
	for (i = instances; i < end; i++)
		if (i->course != GOES_ON || i->why)
			stream_ended(i);
	end_waits();
	for (i = instances; i < end; i++) {
		if (i->why)
			stream_ended(i);
		else if (i->silent && !i->oldest)
			stream_close(i);
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
		stream_close(i);
		stream_unwatch(i);
		free(i->in);
	}
	free(instances);
	free(by_id);
	stream_end();
}
