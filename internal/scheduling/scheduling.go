// Package scheduling fits a process to its work: calls of a module that compute in it for long, and
// everything else, which is short.
package scheduling

import (
	"os"
	"runtime"
)

// ForCalls is for after the module was opened: n calls of it may be under way at a time.
//
// Each call holds one of the processors of Go's scheduler. When they hold all, they are taken away from them
// behind their backs, and threads stop and start with each call: so there are some for the calls besides.
// GOMAXPROCS in the environment stands.
//
// And the threads queue for a core when they wake, instead of taking it from another (SCHED_BATCH of sched(7)): a
// request that comes in does not stop a private-key operation half-way, whose caches would have to be filled again. On
// idle cores that changes nothing. A policy that the process was started with stays. The error is the kernel's, if it
// refuses; everything works without.
func ForCalls(n int) error {
	if cores := runtime.GOMAXPROCS(0); os.Getenv("GOMAXPROCS") == "" {
		// more of them are on their way to an HSM elsewhere, and leave the cores alone
		runtime.GOMAXPROCS(cores + min(n, 2*cores))
	}
	return batch()
}
