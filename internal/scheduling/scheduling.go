// Package scheduling adapts a process to its work: long calculations in a module, and short tasks.
package scheduling

import (
	"os"
	"runtime"
)

// ForCalls prepares the process for n calls of a module at a time. Call it after the module was opened. Go's scheduler
// gets processors for the calls, unless GOMAXPROCS is in the environment. Threads that wake do not interrupt others
// (SCHED_BATCH of sched(7)), unless the process was started with another policy. The error is the kernel's refusal;
// everything works without. docs/decisions/0015-threads-that-do-not-interrupt.md has the reasons.
func ForCalls(n int) error {
	if cores := runtime.GOMAXPROCS(0); os.Getenv("GOMAXPROCS") == "" {
		// more of them are on their way to an HSM elsewhere, and leave the cores alone
		runtime.GOMAXPROCS(cores + min(n, 2*cores))
	}
	return batch()
}
