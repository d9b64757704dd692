/*
 * The life of a binding, as docs/protocol.md has it, for spin: one IMSI, whose SIM moves between two devices; two
 * honest MMEs, and a peer that makes things up. README.md says what is checked, and how.
 *
 * A call is one step, as the store makes it; only PrepareVector has two, since the HSM is asked between them. The
 * answer to each may be lost. What can expire does so at any time. KMEs have no names: what depends on one says of
 * which binding it is now, and of one that has ended it is as good as none.
 */

#define VECTORS 3		/* that a PENDING binding answers: pending_vectors */

/* Of which binding a vector or a device's KME is. */
#define NONE 0
#define CLEAR 1			/* a vector that went out in clear */
#define P 2			/* the PENDING one */
#define A 3			/* the ACTIVE one */

#define HOSTILE 2		/* of the origins, 0 to 2; all may provision */

/* The devices: the one that the SIM is in now, the other, and one that it is never in. */
#define HERE 0
#define THERE 1
#define ELSEWHERE 2

/* Each rule can be broken by its name, for the check to be checked. */
#ifdef ANY_ORIGIN_ACTIVATES
#define ACTIVATES(o) true
#elif defined(ESTABLISHER_ACTIVATES)
#define ACTIVATES(o) (SENT(o) || porigin == o)
#else
#define ACTIVATES(o) SENT(o)
#endif
#ifdef ANY_ORIGIN_ENDS
#define ENDS(o) true
#else
#define ENDS(o) (SENT(o) || porigin == o)
#endif
#ifdef PENDING_FOR_ALL
#define UNDER_PENDING(o) pending
#else
#define UNDER_PENDING(o) (pending && (!bound || porigin == o))
#endif
#ifdef PENDING_STAYS
#define FULL false
#else
#define FULL (pending && pcount >= VECTORS)
#endif
#ifdef SENT_BEFORE_READY
#define NOTE_FIRST(o) psent = psent | BIT(o)
#else
#define NOTE_FIRST(o) skip
#endif
#ifdef SENT_OUTLIVES
#define FORGET_SENT skip
#else
#define FORGET_SENT psent = 0
#endif
#ifdef ATTEMPTS_STAY
#define CLOSE opening = false
#define MAY_ESTABLISH(o) ((attempts & BIT(o)) != 0)
#else
#define CLOSE attempts = 0; opening = false
#define MAY_ESTABLISH(o) ((attempts & BIT(o)) != 0 && (!bound || opening))
#endif
#ifdef CLEAR_COMES_AGAIN
#define SPENT(again) false
#else
#define SPENT(again) again
#endif
#ifdef RESTORED_BY_STATE
#define RESTORES_PENDING(o) pending
#else
#define RESTORES_PENDING(o) (pending && (!bound || SENT(o)))
#endif

#define BIT(o) (1 << (o))
#define SENT(o) ((psent & BIT(o)) != 0)

/* What the service has. */
bool pending, bound, opening;
byte porigin, pcount;
byte psent, attempts;		/* a bit for each origin */

/* What only the world knows. */
byte got;			/* the origins that were sent a vector under the PENDING binding */
byte pdevice;			/* that it was established for */
bool proved;			/* the device that the SIM was in decrypted a vector under it */
byte holds[2];			/* whose KME a device has: its NW_SIG came */
bool ready[3];			/* vectors are being made for an origin under the PENDING binding */
byte last[3];			/* of the last vector that an origin was sent; NONE if it was lost */
bool unused[3], known[3];	/* it was not used yet; its RAND was seen in clear before */
bool calm, settled;
byte tries;

/* Of a step. */
byte o;				/* whose it is */
bool lost;			/* its answer is */
bool others, changed;		/* the PENDING binding is another origin's, beside an ACTIVE one; it is not what it was */

/* becomes says what is of a binding that has ended, or is ACTIVE now. */
#define NOW(x, from, to) if :: x == from -> x = to :: else fi
inline becomes(from, to) {
	NOW(holds[HERE], from, to); NOW(holds[THERE], from, to);
	NOW(last[0], from, to); NOW(last[1], from, to);
	unused[0] = unused[0] && last[0] != NONE; unused[1] = unused[1] && last[1] != NONE;
	ready[0] = false; ready[1] = false; ready[2] = false
}

inline no_pending() {
	pending = false; porigin = 0; pdevice = 0; pcount = 0; psent = 0;
	proved = false; got = 0; changed = true
}

inline end_pending() { becomes(P, NONE); no_pending() }

inline activate() {
	assert(proved);		/* the property */
	becomes(A, NONE); becomes(P, A);
	bound = true;
	no_pending()
}

/* send is what an origin is sent, or would have been. The hostile one has no SIM to use it. */
inline send(under, again) {
	if
	:: o != HOSTILE ->
		last[o] = (lost -> NONE : under);
		unused[o] = !lost; known[o] = again && !lost
	:: else
	fi
}

/* decide is PrepareVector's first step. Of a PENDING binding nothing is sent yet. */
inline decide(again) {
	ready[o] = false;
	if
	:: FULL && !(bound && porigin != o && !opening) -> end_pending()
	:: else
	fi;
	if
	:: opening || !pending && !bound -> attempts = attempts | BIT(o); send(CLEAR, false)
	:: else ->
		if
		:: SPENT(again)
		:: else ->
			if
			:: UNDER_PENDING(o) -> ready[o] = true; NOTE_FIRST(o)
			:: else -> send(A, again)
			fi
		fi
	fi
}

/* leave is the second step, with the vectors ready. If the binding has changed, all begins anew. */
inline leave() {
	if
	:: ready[o] && !FULL && !opening ->
		psent = psent | BIT(o); got = got | BIT(o);
		pcount = (pcount < VECTORS -> pcount + 1 : pcount);
		ready[o] = false;
		send(P, false)
	:: else -> decide(false)
	fi
}

/* Beside an ACTIVE binding, a PENDING one is no matter of other origins. */
inline begin() { others = bound && pending && porigin != o && !FULL && !opening; changed = false }

inline prepare(again) {
	begin();
	decide(again);
	assert(!others || !changed && !ready[o])
}

inline report(ok) {
	begin();
	if
	:: pending && ok && ACTIVATES(o) -> activate()
	:: pending && !ok && ENDS(o) -> end_pending()
	:: else
	fi;
	assert(!others || !changed)
}

/* establish ends the PENDING binding before. */
inline establish(device) {
	assert(!bound || opening);
	becomes(P, NONE);
	pending = true; porigin = o; pdevice = device; pcount = 0; proved = false; got = 0;
	FORGET_SENT;
	CLOSE
}

/* aka is that of the SIM in the device where it is. */
inline aka() {
	unused[o] = false;
	if
	:: last[o] == CLEAR
	:: last[o] != CLEAR && holds[HERE] == last[o] -> proved = proved || last[o] == P
	:: else -> assert(!known[o]); last[o] = NONE	/* no device passes without the KME */
	fi;
	known[o] = false
}

/* An MME where the SIM has passed AKA in clear takes a payload. */
#define PROVISIONS (last[o] == CLEAR && !unused[o] && MAY_ESTABLISH(o))

/* What is assumed: an MME that was sent a vector under a PENDING binding reports success only after an AKA with it. */
#define BELIEVED !(pending && (got & BIT(o)) != 0 && !proved)

/* Resynchronisation restores the RAND of the last vector that an origin was sent, if its KME is still there. */
#define RESTORED(o) ((last[o] != P || RESTORES_PENDING(o)) && (last[o] != A || !RESTORES_PENDING(o)))

/* The device that has the SIM is bound; or an ACTIVE binding whose KME it does not have bars it. */
#define BOUND (bound && holds[HERE] == A)
#define BARRED (bound && holds[HERE] != A && !opening && !(pending && porigin == 0))

ltl heals { [] (calm -> <> settled) }

inline move() {
	d = holds[HERE]; holds[HERE] = holds[THERE]; holds[THERE] = d; d = 0;
	pdevice = (pending && pdevice != ELSEWHERE -> 1 - pdevice : pdevice)
}

init {
	byte d;
	do
	:: calm -> break
	:: else -> atomic {
		if
		:: o = 0
		:: o = 1
		:: o = 2
		fi;
		if
		:: lost = false
		:: lost = true
		fi;
		if
		:: !ready[o] -> prepare(false)
		:: !ready[o] && !lost -> prepare(true)		/* with a RAND that was seen in clear */
		:: ready[o] -> leave()
		:: ready[o] && !lost -> ready[o] = false	/* the HSM is away */
		:: unused[o] && !lost -> aka()
		:: o != HOSTILE && PROVISIONS -> establish(HERE); holds[HERE] = (lost -> holds[HERE] : P)
		:: pending && porigin == o && pdevice != ELSEWHERE && !lost -> holds[pdevice] = P	/* the same again */
		:: o == HOSTILE && MAY_ESTABLISH(o) && !lost -> establish(ELSEWHERE)
		:: BELIEVED && !lost -> report(true)		/* ULR, after AKA or without */
		:: !lost -> report(false)
		:: o == 0 && !lost -> move()
		:: o == 0 && !lost && pending -> end_pending()			/* pending_ttl */
		:: o == 0 && !lost && attempts != 0 -> attempts = 0; opening = false	/* attempt_ttl */
		:: o == 0 && !lost -> attempts = 0; opening = true		/* an administrator opens, */
		:: o == 0 && !lost && (pending || bound) ->			/* and revokes */
			end_pending(); becomes(A, NONE); bound = false; attempts = 0; opening = false
		:: o == 0 && !lost -> calm = true
		fi;
		assert(RESTORED(0) && RESTORED(1));
		o = 0; lost = false; others = false; changed = false
		}
	od;

	/* Nothing is lost any more, and the SIM stays and attaches at one MME, until it is bound. */
	atomic {
		last[0] = NONE; unused[0] = false; known[0] = false; ready[0] = false;
		last[1] = NONE; unused[1] = false; known[1] = false; ready[1] = false;
		attempts = 0
	}
	do
	:: BOUND || BARRED -> break
	:: else -> atomic {
		tries++;
		assert(tries <= VECTORS + 2);
		prepare(false);
		if
		:: ready[o] -> leave()
		:: else
		fi;
		aka();
		if
		:: PROVISIONS -> establish(HERE); holds[HERE] = P
		:: else
		fi;
		if
		:: BELIEVED -> report(true)
		:: else
		fi;
		others = false; changed = false
		}
	od;
	settled = true
}
