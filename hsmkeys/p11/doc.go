// Package p11 is a PKCS #11 token that stays usable: a module of which the process makes one C_Initialize, a bounded
// pool of sessions, a login, a circuit breaker that opens when the token goes and closes when it is back, calls that
// are given up when they hang, and several tokens with the same keys as one pool. It knows no key of this project, and
// nothing but hsmkeys and the packages below it imports it.
//
// All that it runs on a token goes through [Do]. Object handles end with the login; [Token.Remembered] keeps them for
// exactly that long.
package p11
