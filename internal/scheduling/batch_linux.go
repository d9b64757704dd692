package scheduling

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

func batch() error {
	for again := true; again; { // a thread may be made by one that has not been told yet
		again = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			id, err := strconv.Atoi(task.Name())
			if err != nil {
				return err
			}
			attr, err := unix.SchedGetAttr(id, 0)
			if err == nil && attr.Policy == unix.SCHED_NORMAL {
				again = true
				attr.Policy = unix.SCHED_BATCH
				err = unix.SchedSetAttr(id, attr, 0)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return err
			}
		}
	}
	return nil
}
