/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kme.fdx: KME binding (3GPP TR 33.868, 5.4.4.2.3.3.3) for S6a, and an equipment identity register for S13, as an
 * extension of freeDiameter. See ../../docs/s6a.md and ../../docs/equipment.md.
 *
 * It works in an HSS, in front of its S6a handlers, and in an agent between MME and HSS, without a setting: messages
 * for a local application come from the dispatcher, forwarded ones from the router.
 *
 *   dict.c      the dictionary
 *   conf.c      the configuration
 *   tap.c       takes messages from the host, and gives them back
 *   s6a.c       the procedure: what is done with messages of S6a
 *   s13.c       the same for S13
 *   request.c   reads and refuses requests
 *   message.c   reads messages, and makes answers
 *   service.c   the calls to keysvc, and the choice of an instance
 *   stream.c    the requests of calls, by libcurl
 *   calls.c     the messages of calls, of kme.proto
 *   kme.c       start, end, counters and the log
 *
 * A log may show errors only, as Open5GS's does. So everything for an operator is logged as an error.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kme.h"

#define REFUSALS_A_SECOND	10	/* in the log */

static const char *const counter_names[COUNTERS] = {
	"prepared", "restored", "established", "reported", "checked", "refused", "unavailable", "passed-open", "overloaded",
	"limited", "spoofed", "malformed",
};
static atomic_ulong counters[COUNTERS];
static pthread_mutex_t saying = PTHREAD_MUTEX_INITIALIZER;
static uint64_t second;			/* with saying: of the refusals below */
static unsigned long refusals;		/* with saying */
static int started;

void count(enum counter c)
{
	atomic_fetch_add_explicit(&counters[c], 1, memory_order_relaxed);
}

/* Adds more to the refusals of this second, and gives their number. now = 0 ends the last second. */
static unsigned long add_refusals(uint64_t now, unsigned long more)
{
	unsigned long untold = 0, n;

	pthread_mutex_lock(&saying);
	if (now / 1000 != second) {
		if (refusals > REFUSALS_A_SECOND)
			untold = refusals - REFUSALS_A_SECOND;
		second = now / 1000;
		refusals = 0;
	}
	n = refusals += more;
	pthread_mutex_unlock(&saying);
	if (untold)
		LOG_E("kme: %lu more refusals in that second", untold);
	return n;
}

void say_refused(struct msg *m, const char *imsi, const char *origin, const char *why)
{
	struct msg_hdr *h;
	const char *name;

	if (add_refusals(kme_now(), 1) > REFUSALS_A_SECOND || fd_msg_hdr(m, &h))
		return;
	name = h->msg_code == CMD_AIR ? "AIR" : h->msg_code == CMD_ULR ? "ULR" : h->msg_code == CMD_ECR ? "ECR" : "MAR";
	LOG_E("kme: %s refused: %s (IMSI %s, from %s)", name, why, *imsi ? imsi : "unknown",
	      *origin ? origin : "nobody");
}

void tell(int end)
{
	static unsigned long told[COUNTERS];
	static uint64_t due;
	unsigned long now[COUNTERS];
	char line[512] = "";
	size_t used = 0;
	int i;

	add_refusals(end ? 0 : kme_now(), 0);
	if (!due)
		due = kme_now() + 60000;
	if (!end && kme_now() < due)
		return;
	due = kme_now() + 60000;
	for (i = 0; i < COUNTERS; i++)
		now[i] = counters[i];
	if (!memcmp(told, now, sizeof(told)))
		return;
	memcpy(told, now, sizeof(told));
	for (i = 0; i < COUNTERS && used < sizeof(line); i++)
		used += (size_t)snprintf(line + used, sizeof(line) - used, " %s %lu", counter_names[i], now[i]);
	LOG_E("kme:%s", line);
}

static int kme_entry(char *path)
{
	int i;

	CHECK_FCT(conf_read(path));
	CHECK_FCT(dict_own(conf.vendor));
	started = 1;
	CHECK_FCT(kme_service_start(&conf.service));
	CHECK_FCT(tap_start());
	if (conf.s13)	/* what the CER says; the dictionary needs not have the application */
		CHECK_FCT(fd_app_merge(&fd_g_config->cnf_apps, S13_APP, VENDOR_3GPP, 1, 0));
	LOG_E("kme: started: %s, vendor %u, time-out %ld ms, %ld calls in flight, %ld handlers, %d ranges fail open, "
	      "version " VERSION, conf.services.of[0], conf.vendor, conf.service.timeout_ms, conf.service.calls,
	      conf.handlers, conf.open.n);
	for (i = 1; i < conf.services.n; i++)
		LOG_E("kme: another instance: %s", conf.services.of[i]);
	return 0;
}

void fd_ext_fini(void)
{
	if (started)
		tap_end();
	free(conf.text);
}

EXTENSION_ENTRY("kme", kme_entry);
