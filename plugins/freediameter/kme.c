/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kme.fdx: KME binding (3GPP TR 33.868, 5.4.4.2.3.3.3) for S6a, and an equipment identity register for S13, as an
 * extension of freeDiameter. See ../../docs/s6a.md and ../../docs/equipment.md.
 *
 * It does the same in an HSS, beside its own S6a handlers, and in an agent between MME and HSS, and needs not be told
 * which: what is for a local application comes by the dispatcher, what is forwarded by the router.
 *
 *   dict.c      the dictionary
 *   conf.c      the configuration
 *   tap.c       how messages are taken and given back
 *   s6a.c       what becomes of them: the procedure
 *   s13.c       the same of what an equipment identity register is asked
 *   request.c   what a request says, and how it is refused
 *   message.c   how messages are read, and answers made
 *   service.c   the calls of keysvc: which instance gets which, and what becomes of it
 *   stream.c    their requests, by libcurl
 *   calls.c     their messages, of kme.proto
 *   kme.c       the beginning, the end, counters and the log
 *
 * An operator's log may show errors only (Open5GS's does), so all that an operator is to see is logged as one.
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

/* How many there are in this second with so many more. At the time 0 the last second is over. */
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
