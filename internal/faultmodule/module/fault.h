/* What the files of the module know of each other: fault.c says what it does. */
#ifndef FAULT_H
#define FAULT_H

#include <stdint.h>

#include "pkcs11go.h"

#define CKM_AES_KEY_WRAP_KWP 0x210BUL

/* What the module counts beside calls. */
enum figure {
	longest,       /* how many calls came one after the other: each began when the one before had ended */
	decryptions,   /* of "network", which took a turn of those */
	replayed,      /* that were not computed */
	idle_ns,       /* how long "network" could have taken another call, and there was none */
	most_sessions, /* that were open at a time */
	most_objects,  /* session objects that were there at a time */
	refused,       /* sessions and objects, by "limits" */
	now_sessions,  /* that are open */
	now_objects,   /* session objects that are there */
	figures
};

void count(enum figure f, uint64_t n);
void at_least(enum figure f, uint64_t n);
void figure_is(enum figure f, uint64_t n);

/* fault.c: the control file, and the calls of the module */

/* The lines of attributes: VERB FUNCTION TYPE. */
struct rules {
	struct rule {
		char verb[64], function[32];
		unsigned long type;
	} rule[16];
	int count;
};

void read_rules(struct rules *r);
int rules(struct rules *r, const char *verb, const char *name, CK_ATTRIBUTE_TYPE type);

/* told finds the action for a function; 0 if there is none. */
int told(const char *name, char action[32], unsigned long *value);

/* settings finds the numbers of a line that has a name and n of them; 0 if there is none. */
int settings(const char *name, int n, unsigned long value[3]);

extern _Thread_local int decrypting; /* the call under way is an RSA decryption */

/* Each makes a call as told. It takes any arguments. */
#define CK_PKCS11_FUNCTION_INFO(name) CK_RV fault_##name();
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO

/* weak.c: attributes, and "kwp" */

/* What an object says that it is. */
struct lie {
	CK_OBJECT_HANDLE object;
	CK_ATTRIBUTE_TYPE type;
	CK_BBOOL value;
};

/* A template without what is ignored or allowed. */
struct template {
	CK_ATTRIBUTE a[64];
	CK_ULONG count;
	struct lie allowed[64];
	CK_ULONG lies;
};

CK_RV lie(CK_RV rv, struct template *t, const CK_OBJECT_HANDLE *object);
void weak_functions(CK_FUNCTION_LIST_PTR list);

/* limits.c: sessions and objects, for "limits"; and decryptions, for "network" and "replay" */

void all_closed(void);
void forget_answers(void);
CK_RV full(void);
CK_RV made(CK_RV rv, CK_SESSION_HANDLE s, struct template *t, const CK_OBJECT_HANDLE *o);
void limited_functions(CK_FUNCTION_LIST_PTR list);

#endif
