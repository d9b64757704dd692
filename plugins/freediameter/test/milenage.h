/* SPDX-License-Identifier: Apache-2.0 */
/* Authentication vectors by Milenage (3GPP TS 35.206), for test subscribers. */
#ifndef MILENAGE_H
#define MILENAGE_H

#include <stdint.h>

#define BLOCK		16
#define SQN_SIZE	6
#define MAC_SIZE	8
#define RES_SIZE	8
#define PLMN_SIZE	3
#define KASME_SIZE	32
#define AUTN_SIZE	(SQN_SIZE + 2 + MAC_SIZE)
#define AUTS_SIZE	(SQN_SIZE + MAC_SIZE)
#define RESYNC_SIZE	(BLOCK + AUTS_SIZE)

struct vector {
	uint8_t rand[BLOCK];
	uint8_t xres[RES_SIZE];
	uint8_t autn[AUTN_SIZE];
	uint8_t ck[BLOCK], ik[BLOCK];
	uint8_t kasme[KASME_SIZE];	/* TS 33.401, A.2 */
	uint8_t sres[4], kc[8];		/* TS 33.102, 6.8.1.2: c2 and c3 */
};

/* Fills all of a vector but its RAND, which is there. eps: the AMF separation bit (TS 33.401, 6.1.2). */
int milenage_vector(const uint8_t k[BLOCK], const uint8_t opc[BLOCK], uint64_t sqn, int eps, const uint8_t plmn[PLMN_SIZE],
		    struct vector *v);

/* RAND || AUTS (TS 33.102, 6.3.3): SQN of the SIM; EPERM where MAC-S is not right. */
int milenage_open_auts(const uint8_t k[BLOCK], const uint8_t opc[BLOCK], const uint8_t info[RESYNC_SIZE], uint64_t *sqn);

#endif
