package keysvcd

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/api"
)

// leaving is how a service ends so that no call fails: it says that it is not ready any more, serves on until whoever
// sends it calls can have seen that, ends its streams, and only then closes its ports.
type leaving struct {
	told  context.Context // ends when the service is told to end
	asked atomic.Int64    // when somebody has last asked whether the service is ready, in Unix nanoseconds
}

// stay gives the context of the service: it ends once told has ended and the delay is over. Nobody is waited for who
// has not asked, in as long a time, whether the service is ready.
func (l *leaving) stay(delay time.Duration, log *slog.Logger) (context.Context, context.CancelFunc) {
	serving, stop := context.WithCancel(context.WithoutCancel(l.told))
	context.AfterFunc(l.told, func() {
		defer stop()
		if time.Since(time.Unix(0, l.asked.Load())) >= delay {
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

// begun notes that somebody asks whether the service is ready, and says whether it is told to end.
func (l *leaving) begun() bool {
	l.asked.Store(time.Now().UnixNano())
	return l.told.Err() != nil
}

// farewell is longer than a message to a client takes, and one back: a client that has seen its stream end, and opens
// another all the same, is told the same there, before the connection ends too.
const farewell = 200 * time.Millisecond

// endStreams ends the streams in order, and gives their clients the time to go elsewhere.
func endStreams(s *api.Streams) {
	s.Drain()
	time.Sleep(farewell)
}
