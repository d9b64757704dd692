/* SPDX-License-Identifier: Apache-2.0 */
#include "wire.h"

#include <string.h>

enum type { VARINT, FIXED64, BYTES, FIXED32 = 5 };

static void put(struct wire_out *o, const void *data, size_t size)
{
	if (o->full || size > o->from) {
		o->full = 1;
		return;
	}
	o->from -= size;
	if (size)
		memcpy(o->data + o->from, data, size);
}

static void put_varint(struct wire_out *o, uint64_t n)
{
	uint8_t octets[10];
	size_t size = 0;

	do
		octets[size++] = (uint8_t)(n | 0x80);
	while (n >>= 7);
	octets[size - 1] &= 0x7f;
	put(o, octets, size);
}

static void put_tag(struct wire_out *o, uint32_t field, enum type type)
{
	put_varint(o, (uint64_t)field << 3 | type);
}

void wire_number(struct wire_out *o, uint32_t field, uint64_t n)
{
	if (!n)
		return;
	put_varint(o, n);
	put_tag(o, field, VARINT);
}

void wire_bytes(struct wire_out *o, uint32_t field, const void *data, size_t size)
{
	put(o, data, size);
	put_varint(o, size);
	put_tag(o, field, BYTES);
}

void wire_text(struct wire_out *o, uint32_t field, const char *s)
{
	if (*s)
		wire_bytes(o, field, s, strlen(s));
}

void wire_message(struct wire_out *o, uint32_t field, size_t end)
{
	put_varint(o, end - o->from);
	put_tag(o, field, BYTES);
}

struct wire_in wire_open(const void *data, size_t size)
{
	return (struct wire_in){ .at = data, .end = (const uint8_t *)data + size };
}

static int get_varint(struct wire_in *i, uint64_t *out)
{
	int shift;

	*out = 0;
	for (shift = 0; shift <= 63 && i->at < i->end; shift += 7) {
		uint8_t octet = *i->at++;

		*out |= (uint64_t)(octet & 0x7f) << shift;
		if (!(octet & 0x80))
			return shift < 63 || octet < 2;
	}
	return 0;
}

static int get_bytes(struct wire_in *i, uint64_t size)
{
	if (size > (uint64_t)(i->end - i->at))
		return 0;
	i->data = i->at;
	i->size = (size_t)size;
	i->at += size;
	return 1;
}

int wire_next(struct wire_in *i)
{
	uint64_t tag, size;
	int ok = 0;

	if (i->broken || i->at == i->end)
		return 0;
	i->data = NULL;
	i->size = 0;
	i->number = 0;
	if (get_varint(i, &tag) && tag >> 3 && tag >> 3 <= 0x1fffffff) {
		i->field = (uint32_t)(tag >> 3);
		switch (tag & 7) {
		case VARINT:
			ok = get_varint(i, &i->number);
			break;
		case FIXED64:
			ok = get_bytes(i, 8);
			break;
		case BYTES:
			ok = get_varint(i, &size) && get_bytes(i, size);
			break;
		case FIXED32:
			ok = get_bytes(i, 4);
			break;
		}
	}
	i->broken = !ok;
	return ok;
}
