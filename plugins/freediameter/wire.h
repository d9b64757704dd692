/* SPDX-License-Identifier: Apache-2.0 */
/* As much of Protocol Buffers' encoding (protobuf.dev/programming-guides/encoding) as kme.proto's calls need. */
#ifndef KME_WIRE_H
#define KME_WIRE_H

#include <stddef.h>
#include <stdint.h>

/*
 * A message is written from its end to its beginning, so that the length of its content is known before its prefix. It
 * begins at data + from. Without room, nothing more is written, and that is noted.
 */
struct wire_out {
	uint8_t *data;
	size_t from, end;
	int full;
};

void wire_number(struct wire_out *o, uint32_t field, uint64_t n);	/* 0 is left out, as proto3 has it */
void wire_bytes(struct wire_out *o, uint32_t field, const void *data, size_t size);
void wire_text(struct wire_out *o, uint32_t field, const char *s);	/* empty is left out */
void wire_message(struct wire_out *o, uint32_t field, size_t end);	/* made of what was written since from was end */

/* A message that is read, and its present field: a number, or bytes. */
struct wire_in {
	const uint8_t *at, *end;
	uint32_t field;
	uint64_t number;
	const uint8_t *data;	/* NULL: it is a number */
	size_t size;
	int broken;		/* it is no message */
};

struct wire_in wire_open(const void *data, size_t size);
int wire_next(struct wire_in *i);	/* 0: that was all, or it is broken */

#endif
