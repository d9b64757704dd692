/*
 * A PKCS #11 module around another one, which fails, hangs and delays as a control file tells, and counts calls.
 *
 * KMEHSM_FAULT_MODULE is the module around which it is, KMEHSM_FAULT_CONTROL the control file, read at each call:
 *
 *     C_Decrypt 0x30       returns CKR_DEVICE_ERROR instead of calling
 *     * removed            the first such call closes all sessions, as if the token was pulled out; then as 0x32
 *     C_Sign hang          calls when the line is gone
 *     C_Sign hang-once 7   so does the first call that reads this number; the others are made
 *     * delay 1000         returns 1000 us after it was called, as an HSM at the other end of a network does, or later
 *     trivial 0x40         C_Decrypt returns CKR_ENCRYPTED_DATA_INVALID of what decrypts to itself, as 0, 1 and N-1 do
 *     kwp                  has CKM_AES_KEY_WRAP_KWP (PKCS #11 3.0) in the place of CKM_AES_KEY_WRAP_PAD
 *
 * and, of attributes in templates, as a token that does not keep keys as it should:
 *
 *     ignores C_CopyObject 0x162   makes the call as if the attribute was not in the template
 *     allows C_CopyObject 0x162    so it does, and the object says that it has the value (of a boolean attribute)
 *     refuses C_CopyObject 0x162   returns CKR_ATTRIBUTE_TYPE_INVALID
 *     tells * 0x124                has a length for the attribute, of any object
 *     allows C_WrapKey 0           returns zeros and CKR_OK, of a key that may not be wrapped
 *
 * and, of all calls, as a network HSM with limits of its own, which is as strict as the module that it is around:
 *
 *     network 1000 5000 1000   returns 1000 us after it took the call, of which it takes 5000 a second, and of raw RSA
 *                              decryptions 1000 a second; the others wait. 0 for no limit
 *     replay                   C_Decrypt gives what it has computed before of the same ciphertext, without computing
 *     limits 16 65536          allows 16 sessions and 64 session objects of 1024 bytes, and says so in C_GetTokenInfo
 *
 * The first line that fits counts; * is any function on a session. Those of attributes may come many times.
 * KMEHSM_FAULT_COUNTS is a file that gets, for each function in the order of the standard's list, how often it
 * was called, as 64-bit numbers; and after them the figures of enum figure.
 *
 * It is built with GCC, whose __builtin_apply forwards a call without knowing its arguments.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "fault.h"

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST list;
static _Atomic uint64_t *counts;
static _Atomic int removed;
/* No session is closed under a call on it: tokens that are pulled out see to that themselves. */
static pthread_rwlock_t calls = PTHREAD_RWLOCK_INITIALIZER;
static _Atomic unsigned long hung;

enum index {
#define CK_PKCS11_FUNCTION_INFO(name) index_##name,
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	functions
};

void count(enum figure f, uint64_t n)
{
	if (counts)
		counts[functions + f] += n;
}

void figure_is(enum figure f, uint64_t n)
{
	if (counts)
		counts[functions + f] = n;
}

void at_least(enum figure f, uint64_t n)
{
	if (!counts)
		return;
	for (uint64_t is = counts[functions + f]; is < n; )
		if (atomic_compare_exchange_weak(&counts[functions + f], &is, n))
			return;
}

/* open_control gives the control file, which each thread reads when it has changed; NULL if there is nothing in it. */
static FILE *open_control(void)
{
	static _Thread_local struct stat was;
	static _Thread_local char text[4096];
	static _Thread_local size_t size;
	const char *path = getenv("KMEHSM_FAULT_CONTROL") ?: "";
	struct stat is;

	if (stat(path, &is))
		return NULL;
	if (is.st_ino != was.st_ino || is.st_size != was.st_size || is.st_mtim.tv_sec != was.st_mtim.tv_sec ||
	    is.st_mtim.tv_nsec != was.st_mtim.tv_nsec) {
		FILE *f = fopen(path, "r");
		if (!f)
			return NULL;
		size = fread(text, 1, sizeof text, f);
		fclose(f);
		was = is;
	}
	return size ? fmemopen(text, size, "r") : NULL;
}

int told(const char *name, char action[32], unsigned long *value)
{
	FILE *f = open_control();
	char line[128], function[64];
	int found = 0;

	if (!f)
		return 0;
	while (!found && fgets(line, sizeof line, f)) {
		*value = 0;
		function[0] = action[0] = 0;
		if (sscanf(line, "%63s %31s %lu", function, action, value) < 1)
			continue;
		found = !strcmp(function, name) ||
			(!strcmp(function, "*") && strcmp(name, "C_GetFunctionList") && strcmp(name, "C_Initialize") &&
			 strcmp(name, "C_Finalize"));
	}
	fclose(f);
	return found;
}

void read_rules(struct rules *r)
{
	FILE *f = open_control();
	char line[128];

	r->count = 0;
	if (!f)
		return;
	while (r->count < 16 && fgets(line, sizeof line, f)) {
		struct rule *to = &r->rule[r->count];
		if (sscanf(line, "%63s %31s %li", to->verb, to->function, (long *)&to->type) == 3)
			r->count++;
	}
	fclose(f);
}

int rules(struct rules *r, const char *verb, const char *name, CK_ATTRIBUTE_TYPE type)
{
	for (struct rule *is = r->rule; is < r->rule + r->count; is++)
		if (!strcmp(is->verb, verb) && is->type == type && (!strcmp(is->function, name) || !strcmp(is->function, "*")))
			return 1;
	return 0;
}

int settings(const char *name, int n, unsigned long value[3])
{
	FILE *f = open_control();
	char line[128], is[64];
	int found = 0;

	if (!f)
		return 0;
	while (!found && fgets(line, sizeof line, f))
		found = sscanf(line, "%63s %lu %lu %lu", is, &value[0], &value[1], &value[2]) == 1 + n && !strcmp(is, name);
	fclose(f);
	return found;
}

static _Thread_local struct timespec due; /* when the call under way is to return */
_Thread_local int decrypting; /* the call under way is an RSA decryption */

/* network says when a call returns that was made now. */
static void network(void)
{
	static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
	static int64_t next, next_decryption; /* when the next call may begin; guarded by turn */
	unsigned long v[3];
	struct timespec t;
	int64_t begins;

	if (!settings("network", 3, v))
		return;
	pthread_mutex_lock(&turn);
	clock_gettime(CLOCK_MONOTONIC, &t);
	begins = t.tv_sec * 1000000000LL + t.tv_nsec;
	if (v[1]) {
		if (next && next < begins)
			count(idle_ns, begins - next);
		begins = next > begins ? next : begins;
		next = begins + 1000000000 / v[1];
	}
	if (decrypting && v[2]) {
		begins = next_decryption > begins ? next_decryption : begins;
		next_decryption = begins + 1000000000 / v[2];
		count(decryptions, 1);
	}
	pthread_mutex_unlock(&turn);
	begins += v[0] * 1000LL;
	due.tv_sec = begins / 1000000000;
	due.tv_nsec = begins % 1000000000;
}

static void after(void)
{
	if (!due.tv_sec)
		return;
	prctl(PR_SET_TIMERSLACK, 1); /* else the kernel adds up to 50 us */
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
		;
	due.tv_sec = 0;
}

/* before says what a call returns without being made; CKR_OK if it is to be made. */
static CK_RV before(const char *name, enum index at)
{
	char action[32];
	unsigned long value;

	if (counts)
		counts[at]++;
	while (told(name, action, &value)) {
		if (!strcmp(action, "delay")) {
			clock_gettime(CLOCK_MONOTONIC, &due);
			due.tv_nsec += value % 1000000 * 1000;
			due.tv_sec += value / 1000000 + due.tv_nsec / 1000000000;
			due.tv_nsec %= 1000000000;
			return CKR_OK;
		}
		if (!strcmp(action, "removed")) {
			if (!removed++) {
				CK_SLOT_ID slots[64];
				CK_ULONG n = 64;
				pthread_rwlock_wrlock(&calls);
				if (real->C_GetSlotList(CK_TRUE, slots, &n) == CKR_OK)
					while (n--)
						real->C_CloseAllSessions(slots[n]);
				pthread_rwlock_unlock(&calls);
				all_closed();
			}
			return CKR_DEVICE_REMOVED;
		}
		if (!strcmp(action, "hang-once")) {
			if (atomic_exchange(&hung, value) == value)
				return CKR_OK;
			while (told(name, action, &value) && !strcmp(action, "hang-once"))
				usleep(5000);
			return CKR_OK;
		}
		if (strcmp(action, "hang"))
			return strtoul(action, NULL, 0);
		usleep(5000);
	}
	removed = 0;
	network();
	return CKR_OK;
}

#define CK_PKCS11_FUNCTION_INFO(name) \
	CK_RV fault_##name() \
	{ \
		uint64_t chain = counts ? counts[functions + longest] : 0; \
		CK_RV rv = before(#name, index_##name); \
		void *result; \
		if (rv != CKR_OK) \
			return rv; \
		pthread_rwlock_rdlock(&calls); \
		result = __builtin_apply((void (*)())real->name, __builtin_apply_args(), 128); \
		pthread_rwlock_unlock(&calls); \
		after(); \
		at_least(longest, chain + 1); \
		__builtin_return(result); \
	}
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	const char *path = getenv("KMEHSM_FAULT_COUNTS");
	CK_RV (*get)(CK_FUNCTION_LIST_PTR_PTR);
	void *module;

	if (real) {
		*out = &list;
		return CKR_OK;
	}
	module = dlopen(getenv("KMEHSM_FAULT_MODULE") ?: "", RTLD_NOW | RTLD_LOCAL);
	*(void **)&get = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (!get || get(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	if (path) {
		int fd = open(path, O_RDWR | O_CREAT, 0600);
		if (fd < 0 || ftruncate(fd, (functions + figures) * sizeof *counts))
			return CKR_GENERAL_ERROR;
		counts = mmap(NULL, (functions + figures) * sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		if (counts == MAP_FAILED)
			return CKR_GENERAL_ERROR;
	}
	list.version = real->version;
#define CK_PKCS11_FUNCTION_INFO(name) list.name = (CK_##name)fault_##name;
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	list.C_GetFunctionList = C_GetFunctionList;
	limited_functions(&list);
	weak_functions(&list);
	*out = &list;
	return CKR_OK;
}
