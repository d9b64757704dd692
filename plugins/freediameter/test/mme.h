/* SPDX-License-Identifier: Apache-2.0 */
/* The test MME's two halves: the socket with its lines (mme.c), and what they mean in Diameter (mme_lines.c). */
#ifndef MME_H
#define MME_H

#include "tgpp.h"

struct text {
	char *data;
	size_t off, len, room;	/* what is between off and len is still to be used */
};

int text_add(struct text *t, const void *data, size_t size);
int text_print(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Makes a request of a line's words. NULL: done, else why not; "malformed" where the line is none. */
const char *mme_request(char **words, int count, const char *realm, struct msg **msg);

/* The line for an answer, without its end. */
int mme_answer(struct text *t, const char *id, struct msg *answer);

#endif
