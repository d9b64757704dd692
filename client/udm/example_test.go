package udm_test

import (
	"encoding/hex"
	"encoding/json"
	"net/http"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/client/udm"
)

// hss has the keys and sequence numbers of the SIMs, and makes vectors as ever.
type hss interface {
	Vector(supi string, rand client.RAND) udm.Vector
	Resynchronise(supi string, rand client.RAND, auts []byte)
	RAND() client.RAND
}

// A UDM's two handlers of Nudm_UEAuthentication, without its checks of what comes. What is there for the binding is six
// lines.
func Example() {
	var arpf hss
	keysvc, err := client.New(client.Options{URLs: []string{"unix:/run/kmehsm/keysvc.sock"}})
	if err != nil {
		panic(err)
	}
	u := udm.New(keysvc)

	http.HandleFunc("POST /nudm-ueau/v1/{supi}/security-information/generate-auth-data",
		func(w http.ResponseWriter, r *http.Request) {
			var q struct {
				ServingNetworkName    string
				ResynchronizationInfo *struct{ Rand, Auts string }
			}
			json.NewDecoder(r.Body).Decode(&q)
			supi, network := r.PathValue("supi"), q.ServingNetworkName
			if s := q.ResynchronizationInfo; s != nil {
				rand, _ := hex.DecodeString(s.Rand)
				auts, _ := hex.DecodeString(s.Auts)
				restored, err := u.RestoreRAND(r.Context(), supi, network, client.RAND(rand))
				if err != nil {
					http.Error(w, err.Error(), http.StatusForbidden)
					return
				}
				arpf.Resynchronise(supi, restored, auts)
			}
			av, err := u.GenerateAuthData(r.Context(), supi, network, arpf.Vector(supi, arpf.RAND()))
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			// av.AttemptID is kept for the payload.
			json.NewEncoder(w).Encode(map[string]any{"authType": "5G_AKA", "supi": supi, "authenticationVector": av})
		})
	http.HandleFunc("POST /nudm-ueau/v1/{supi}/auth-events", func(w http.ResponseWriter, r *http.Request) {
		var e struct {
			Success            bool
			ServingNetworkName string
		}
		json.NewDecoder(r.Body).Decode(&e)
		served, err := u.ConfirmAuth(r.Context(), r.PathValue("supi"), e.ServingNetworkName, e.Success)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		_ = served // is kept, and asked when an AMF registers
		w.WriteHeader(http.StatusCreated)
	})
}
