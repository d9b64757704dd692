/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "kme.h"

#define MAX_SOCKET	107	/* the longest path of a Unix socket (unix(7)) */

struct conf conf = {
	.service = { .timeout_ms = 2000, .calls = 256, .breaker = 3 }, .vendor = VENDOR_OWN, .handlers = 4,
	.origin_rate = 10000,
};

int conf_names(const struct list *l, const char *name)
{
	size_t size = strlen(name);
	int i;

	for (i = 0; i < l->n; i++) {
		const char *of = l->of[i];
		size_t tail = strlen(of) - 1;	/* of *.REALM, without the star */

		if (*of == '*' ? size > tail && !strcasecmp(name + size - tail, of + 1) : !strcasecmp(name, of))
			return 1;
	}
	return 0;
}

static int is_digits(const char *s, size_t least, size_t most)
{
	size_t n = strlen(s);

	return n >= least && n <= most && strspn(s, "0123456789") == n;
}

static const char *bad_imsi(const char *s)
{
	return is_digits(s, 5, 15) ? NULL : "the beginning of IMSIs, at least MCC and MNC";
}

static const char *bad_host(const char *s)
{
	if (!strncmp(s, "*.", 2))
		s += 2;
	return *s && strlen(s) <= MAX_ORIGIN && !strpbrk(s, "* \t") ? NULL : "a host name, or *.REALM";
}

static const char *bad_realm(const char *s)
{
	return *s != '*' ? bad_host(s) : "a realm";
}

static const char *bad_plmn(const char *s)
{
	if (!strcmp(s, "home") || !strcmp(s, "any") || is_digits(s, 5, 6))
		return NULL;
	return "home, any, or the digits of MCC and MNC";
}

static int complain(const char *key, const char *want, const char *value)
{
	LOG_F("kme: %s is %s, not \"%s\"", key, want, value);
	return EINVAL;
}

static int begins(const char *s, const char *with)
{
	return !strncmp(s, with, strlen(with));
}

static const char *bad_service(const char *s)
{
	if (begins(s, "unix:/") ? strlen(s) > 5 + MAX_SOCKET :
				  !begins(s, "https://") || !s[8] || strchr(s + 8, '/') || strlen(s) > 200)
		return "https://HOST:PORT or unix:/PATH, whose path has 107 bytes at most";
	return NULL;
}

/* Here and below, 1 means: the key is of another sort. */
static int set_text(const char *key, const char *value)
{
	const struct {
		const char *key;
		const char **to;
	} texts[] = {
		{ "ca", &conf.service.ca }, { "cert", &conf.service.cert }, { "key", &conf.service.key },
	};
	size_t i;

	for (i = 0; i < sizeof(texts) / sizeof(*texts); i++)
		if (!strcmp(key, texts[i].key)) {
			*texts[i].to = value;
			return 0;
		}
	return 1;
}

static int set_number(const char *key, const char *value)
{
	static long vendor;
	const struct {
		const char *key;
		long low, high, *to;
	} numbers[] = {
		{ "vendor", 1, 0xffffffffL, &vendor },
		{ "timeout_ms", 10, 60000, &conf.service.timeout_ms },
		{ "in_flight", 1, 10000, &conf.service.calls },
		{ "breaker", 1, 1000, &conf.service.breaker },
		{ "handlers", 1, 64, &conf.handlers },
		{ "origin_rate", 1, 1000000, &conf.origin_rate },
	};
	size_t i;

	for (i = 0; i < sizeof(numbers) / sizeof(*numbers); i++)
		if (!strcmp(key, numbers[i].key)) {
			char *end, want[64];
			long n = strtol(value, &end, 10);

			snprintf(want, sizeof(want), "a number from %ld to %ld", numbers[i].low, numbers[i].high);
			if (!*value || *end || n < numbers[i].low || n > numbers[i].high)
				return complain(key, want, value);
			*numbers[i].to = n;
			if (numbers[i].to != &vendor)
				return 0;
			conf.vendor = (uint32_t)n;
			/* 3GPP has AVPs with our numbers, and MMEs announce its features with our bit. */
			return n == VENDOR_3GPP ? complain(key, "an enterprise number of your own", value) : 0;
		}
	return 1;
}

static int set_list(const char *key, const char *value)
{
	const struct {
		const char *key;
		struct list *to;
		const char *(*bad)(const char *);
	} lists[] = {
		{ "service", &conf.services, bad_service },
		{ "open", &conf.open, bad_imsi },
		{ "agent", &conf.agents, bad_host },
		{ "legacy_mme", &conf.legacy_mmes, bad_host },
		{ "provision_from", &conf.provision_from, bad_plmn },
		{ "home_realm", &conf.home_realms, bad_realm },
	};
	size_t i;

	for (i = 0; i < sizeof(lists) / sizeof(*lists); i++)
		if (!strcmp(key, lists[i].key)) {
			const char *want = lists[i].bad(value);

			if (want)
				return complain(key, want, value);
			if (lists[i].to->n == MAX_LIST) {
				LOG_F("kme: there are more than %d lines of %s", MAX_LIST, key);
				return EINVAL;
			}
			lists[i].to->of[lists[i].to->n++] = value;
			return 0;
		}
	return 1;
}

static int set_choice(const char *key, const char *value)
{
	static const char *const modes[] = { "refuse", "process", "pass" };
	enum mode *mode = !strcmp(key, "swx") ? &conf.swx :
			  !strcmp(key, "cx") ? &conf.cx :
			  !strcmp(key, "zh") ? &conf.zh : NULL;
	int i;

	for (i = 0; mode && i < 3; i++)
		if (!strcmp(value, modes[i])) {
			*mode = (enum mode)i;
			return 0;
		}
	if (mode)
		return complain(key, "refuse, process or pass", value);
	if (!strcmp(key, "s13")) {
		conf.s13 = !strcmp(value, "serve");
		return conf.s13 || !strcmp(value, "pass") ? 0 : complain(key, "serve or pass", value);
	}
	if (strcmp(key, "rejected"))
		return 1;
	conf.authorization_rejected = !strcmp(value, "authorization-rejected");
	if (!conf.authorization_rejected && strcmp(value, "unknown-subscription"))
		return complain(key, "unknown-subscription or authorization-rejected", value);
	return 0;
}

/* All but lists may be there once: of two values, one is not what its writer meant. */
static int set(const char *key, const char *value)
{
	int (*const sorts[])(const char *, const char *) = { set_text, set_number, set_choice };
	int err = set_list(key, value), i;

	for (i = 0; err == 1 && i < conf.keys.n; i++)
		if (!strcmp(conf.keys.of[i], key)) {
			LOG_F("kme: %s is there twice", key);
			return EINVAL;
		}
	for (i = 0; err == 1 && i < 3; i++) {
		err = sorts[i](key, value);
		if (!err)
			conf.keys.of[conf.keys.n++] = key;
	}
	if (err != 1)
		return err;
	LOG_F("kme: there is no setting \"%s\"", key);
	return EINVAL;
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
static int parse(const char *path)
{
	char *line, *rest, *value;

	for (line = strtok_r(conf.text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
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
	return 0;
}

/* NULL: no setting is there twice. */
static const char *twice(const struct list *l)
{
	int i, j;

	for (i = 0; i < l->n; i++)
		for (j = 0; j < i; j++)
			if (!strcmp(l->of[i], l->of[j]))
				return l->of[i];
	return NULL;
}

static int given(const char *text)
{
	return text && *text;
}

int conf_read(const char *path)
{
	struct kme_service *s = &conf.service;
	FILE *f = path ? fopen(path, "re") : NULL;
	const char *same;
	size_t size;
	int i;

	if (!f) {
		LOG_F("kme: the configuration %s cannot be read: LoadExtension = \"kme.fdx\" : \"/path/of/kme.conf\";",
		      path ? path : "(none)");
		return EINVAL;
	}
	conf.text = calloc(1, 65537);
	size = conf.text ? fread(conf.text, 1, 65536, f) : 0;
	fclose(f);
	if (!conf.text || size == 65536 || strlen(conf.text) != size) {
		LOG_F("kme: %s is no configuration", path);
		return EINVAL;
	}
	CHECK_FCT(parse(path));
	s->urls = conf.services.of;
	s->n = conf.services.n;
	if (!s->n || s->n > KME_INSTANCES) {
		LOG_F("kme: %s: there is a line of service for each instance of keysvc, from 1 to %d, not %d", path,
		      KME_INSTANCES, s->n);
		return EINVAL;
	}
	if ((same = twice(&conf.services))) {
		LOG_F("kme: %s: service = %s is there twice", path, same);
		return EINVAL;
	}
	for (i = 0; i < s->n; i++)
		if (begins(s->urls[i], "https:") && (!given(s->ca) || !given(s->cert) || !given(s->key))) {
			LOG_F("kme: %s: https needs ca, cert and key, the files of mutual TLS", path);
			return EINVAL;
		}
	if (!conf.provision_from.n)
		conf.provision_from = (struct list){ .of = { "home" }, .n = 1 };
	return 0;
}
