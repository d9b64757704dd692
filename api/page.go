package api

import (
	"context"
	"net/http"

	"github.com/kmehsm/kmehsm/binding"
)

// For serves pages to clients that have a role. Their requests are authenticated, refused, limited and logged as calls
// are.
func For(role Role, service *binding.Service, clients *Clients, pages http.Handler) http.Handler {
	g := &guard{service: service}
	return identify(clients, g.known(g.only(pages, role), ""))
}

// View is which bindings the client of a request may see.
func View(ctx context.Context) binding.BindingQuery { return clientOf(ctx).view }
