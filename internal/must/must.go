// Package must ends a test at an error.
package must

import "testing"

// Do ends the test if err is one.
func Do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Get gives what a call has given, unless that failed: key := must.Get[*rsa.PublicKey](t)(pemkey.RSA(data)).
func Get[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		Do(t, err)
		return v
	}
}
