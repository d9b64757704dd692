// Package scheduling adapts a process to its work: long calculations in a module, and short tasks.
package scheduling

import (
	"os"
	"runtime"
)

// ForCalls prepares the process for n calls of a module at a time. Call it after the module was opened.
//
// Each call holds one of the processors of Go's scheduler. If calls hold all, Go takes processors away from them, and
// threads stop and start with each call: so there are more processors for the calls. GOMAXPROCS in the environment
// overrides this.
//
// Threads that wake queue for a core, instead of taking it from another thread (SCHED_BATCH of sched(7)). So a new
// request does not interrupt a private-key operation, which would have to fill its caches again. On idle cores that
// changes nothing. If the process was started with another policy, that stays. The error is the kernel's refusal;
// everything works without.
func ForCalls(n int) error {
	if cores := runtime.GOMAXPROCS(0); os.Getenv("GOMAXPROCS") == "" {
		// more of them are on their way to an HSM elsewhere, and leave the cores alone
		runtime.GOMAXPROCS(cores + min(n, 2*cores))
	}
	return batch()
}
