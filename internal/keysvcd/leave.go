package keysvcd

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// leaving ends a service so that no call fails. First /readyz says that it is not ready. It serves on until its clients
// can have seen that, then ends its streams, and only then closes its ports.
type leaving struct {
	told  context.Context           // ends when the service is told to end
	asked atomic.Pointer[time.Time] // when somebody has last asked whether the service is ready; nil: nobody has
}

// stay gives the context of the service: it ends when told has ended and the delay is over. There is no delay if nobody
// asked for so long whether the service is ready.
func (l *leaving) stay(delay time.Duration, log *slog.Logger) (context.Context, context.CancelFunc) {
	serving, stop := context.WithCancel(context.WithoutCancel(l.told))
	context.AfterFunc(l.told, func() {
		defer stop()
		if last := l.asked.Load(); last == nil || time.Since(*last) >= delay {
			return
		}
		log.Info("not ready any more; calls are served for the drain delay", "delay", delay.String())
		select {
		case <-time.After(delay):
		case <-serving.Done():
		}
	})
	return serving, stop
}

// begun notes that somebody asks whether the service is ready, and says whether it is about to end.
func (l *leaving) begun() bool {
	now := time.Now() // with its monotonic clock: whoever sets the machine's clock does not change the delay
	l.asked.Store(&now)
	return l.told.Err() != nil
}

// farewell is the time that clients get to use another instance when their streams have ended in order. It is longer
// than a round trip. A client that opens another stream gets the same answer there, before the connection ends.
const farewell = 200 * time.Millisecond
