package api

import (
	"context"
	"net/http"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// For serves pages to clients that have a role. Their requests are authenticated, refused, limited and logged as calls
// are.
func For(role Role, service *binding.Service, clients *Clients, pages http.Handler) http.Handler {
	g := &guard{service: service}
	limited := g.only(pages, role)
	return identify(clients, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := func() (err error) {
			defer panics.Recover(&err)
			if clientOf(r.Context()) == nil {
				stranger(r.Context(), service, r.URL.Path)
				http.Error(w, notAllowed().Message, http.StatusForbidden)
				return nil
			}
			limited.ServeHTTP(w, r)
			return nil
		}()
		if err != nil {
			service.Broken(r.Context(), err, callOf(r.URL.Path)...)
			http.Error(w, "internal error", http.StatusInternalServerError)
		}
	}))
}

// View is which bindings the client of a request may see.
func View(ctx context.Context) binding.BindingQuery { return clientOf(ctx).view }
