package api

import (
	"net/http"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
)

// CheckEquipment makes that call for the sender of a request in another protocol, with the same checks. A refusal is a
// *binding.Refusal.
func (h *Handler) CheckEquipment(r *http.Request, q *kmev1.CheckEquipmentRequest) (
	answer *kmev1.CheckEquipmentResponse, err error) {
	identify(h.clients, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if clientOf(r.Context()) == nil {
			stranger(r.Context(), h.server.service, callOf(r.URL.Path)...)
			err = notAllowed()
			return
		}
		var a connect.AnyResponse
		call := &kmev1.Call{Call: &kmev1.Call_CheckEquipment{CheckEquipment: q}}
		a, err = h.call(r.Context(), h.server.requestOf(call))
		if err == nil {
			answer = a.Any().(*kmev1.CheckEquipmentResponse)
		} else if refusal := refusalOf(err); refusal != nil {
			err = refusal
		}
	})).ServeHTTP(nil, r)
	return answer, err
}
