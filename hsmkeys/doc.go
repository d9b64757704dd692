// Package hsmkeys makes every PKCS #11 call of this project, and does nothing else: it opens tokens, makes and
// finds keys, wraps, unwraps, decrypts, verifies, signs and seals. It knows the protocol of package kme, but no
// lots' business, no directory and no database.
//
// No private or secret key ever leaves a token through this package other than wrapped. It never fetches
// an attribute that could hold one: to see that refused, the doctor asks how long it is.
//
// Handles are never kept longer than a Token: keys are looked up by CKA_ID, which is derived from what the key is
// for (see Key), so that a second run finds its own key and an outage cannot swap two keys.
package hsmkeys
