package binding

import (
	"context"
	"log/slog"
)

// An Actor is who asks for something: a client of the service, or a user at the command line. It stands in the ledger
// beside what was done, and in each log line.
type Actor struct {
	Client      string `json:"client"`                // the name that the configuration gives it, or of the command
	Role        string `json:"role,omitempty"`        // by which it may ask for that
	Certificate string `json:"certificate,omitempty"` // the SHA-256 of its certificate, hex
	User        string `json:"user,omitempty"`        // at the other end of the Unix socket, or who runs the command
	Address     string `json:"address,omitempty"`     // from where it came
}

type actorKey struct{}

// WithActor gives a context to everything that is done for an actor.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a)
}

// ActorOf gives the actor of a context; the zero Actor is the service itself.
func ActorOf(ctx context.Context) Actor {
	a, _ := ctx.Value(actorKey{}).(Actor)
	return a
}

// An actorLog adds the actor of the context to each line.
type actorLog struct{ slog.Handler }

func (h actorLog) Handle(ctx context.Context, r slog.Record) error {
	if a := ActorOf(ctx); a != (Actor{}) {
		r.AddAttrs(slog.Any("actor", a))
	}
	return h.Handler.Handle(ctx, r)
}

func (h actorLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return actorLog{Handler: h.Handler.WithAttrs(attrs)}
}
func (h actorLog) WithGroup(name string) slog.Handler {
	return actorLog{Handler: h.Handler.WithGroup(name)}
}

// LogValue is slog.LogValuer's.
func (a Actor) LogValue() slog.Value {
	var attrs []slog.Attr
	for _, f := range []struct{ name, value string }{
		{name: "client", value: a.Client}, {name: "role", value: a.Role},
		{name: "certificate", value: a.Certificate}, {name: "user", value: a.User},
		{name: "address", value: a.Address},
	} {
		if f.value != "" {
			attrs = append(attrs, slog.String(f.name, f.value))
		}
	}
	return slog.GroupValue(attrs...)
}
