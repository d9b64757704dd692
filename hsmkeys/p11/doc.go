// Package p11 is a PKCS #11 token that stays usable: a module that the process initialises once, a bounded pool of
// sessions, a login, a circuit breaker that is open while the token is away, calls that are given up when they hang,
// and several tokens with the same keys as one pool. It knows no key of this project, and nothing but hsmkeys and the
// packages below it imports it.
//
// All operations run through [Do]. Object handles are valid as long as the login; [Token.Remembered] keeps them exactly
// that long.
package p11
