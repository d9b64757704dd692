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
 *     kwp                  has CKM_AES_KEY_WRAP_KWP (PKCS #11 3.0) in the place of CKM_AES_KEY_WRAP_PAD
 *
 * The first line that fits counts; * is any function on a session. KMEHSM_FAULT_COUNTS is a file that gets, for each function in
 * the order of the standard's list, how often it was called, as 64-bit numbers.
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
#include <time.h>
#include <unistd.h>

#include "pkcs11go.h"

#define CKM_AES_KEY_WRAP_KWP 0x210BUL

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

/* told finds the action for a function; 0 if there is none. */
static int told(const char *name, char action[32], unsigned long *value)
{
	FILE *f = fopen(getenv("KMEHSM_FAULT_CONTROL") ?: "", "r");
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
			(!strcmp(function, "*") && strcmp(name, "C_GetFunctionList") && strcmp(name, "C_Initialize") && strcmp(name, "C_Finalize"));
	}
	fclose(f);
	return found;
}

static _Thread_local struct timespec due; /* when the call under way is to return */

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
	return CKR_OK;
}

static int kwp(void)
{
	char action[32];
	unsigned long value;
	return told("kwp", action, &value);
}

static CK_RV wrap_mechanism(CK_MECHANISM_PTR given, CK_MECHANISM_PTR use)
{
	*use = *given;
	if (kwp()) {
		if (given->mechanism == CKM_AES_KEY_WRAP_PAD)
			return CKR_MECHANISM_INVALID;
		if (given->mechanism == CKM_AES_KEY_WRAP_KWP)
			use->mechanism = CKM_AES_KEY_WRAP_PAD;
	}
	return CKR_OK;
}

#define CK_PKCS11_FUNCTION_INFO(name) \
	static CK_RV fault_##name() \
	{ \
		CK_RV rv = before(#name, index_##name); \
		void *result; \
		if (rv != CKR_OK) \
			return rv; \
		pthread_rwlock_rdlock(&calls); \
		result = __builtin_apply((void (*)())real->name, __builtin_apply_args(), 128); \
		pthread_rwlock_unlock(&calls); \
		after(); \
		__builtin_return(result); \
	}
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO

static CK_RV with_kwp_C_WrapKey(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE w, CK_OBJECT_HANDLE k, CK_BYTE_PTR out, CK_ULONG_PTR n)
{
	CK_MECHANISM use;
	CK_RV rv = wrap_mechanism(m, &use);
	return rv != CKR_OK ? rv : ((CK_C_WrapKey)fault_C_WrapKey)(s, &use, w, k, out, n);
}

static CK_RV with_kwp_C_UnwrapKey(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE u, CK_BYTE_PTR in, CK_ULONG n, CK_ATTRIBUTE_PTR a, CK_ULONG count, CK_OBJECT_HANDLE_PTR k)
{
	CK_MECHANISM use;
	CK_RV rv = wrap_mechanism(m, &use);
	return rv != CKR_OK ? rv : ((CK_C_UnwrapKey)fault_C_UnwrapKey)(s, &use, u, in, n, a, count, k);
}

static CK_RV with_kwp_C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info)
{
	CK_MECHANISM m = { type, NULL, 0 }, use;
	CK_RV rv = wrap_mechanism(&m, &use);
	return rv != CKR_OK ? rv : ((CK_C_GetMechanismInfo)fault_C_GetMechanismInfo)(slot, use.mechanism, info);
}

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
		if (fd < 0 || ftruncate(fd, functions * sizeof *counts))
			return CKR_GENERAL_ERROR;
		counts = mmap(NULL, functions * sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		if (counts == MAP_FAILED)
			return CKR_GENERAL_ERROR;
	}
	list.version = real->version;
#define CK_PKCS11_FUNCTION_INFO(name) list.name = (CK_##name)fault_##name;
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	list.C_GetFunctionList = C_GetFunctionList;
	list.C_WrapKey = with_kwp_C_WrapKey;
	list.C_UnwrapKey = with_kwp_C_UnwrapKey;
	list.C_GetMechanismInfo = with_kwp_C_GetMechanismInfo;
	*out = &list;
	return CKR_OK;
}
