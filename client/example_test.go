package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"

	"connectrpc.com/connect"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/kme"
)

// A service knows one subscription, which is not bound yet, and accepts no device.
type service struct {
	kmev1connect.UnimplementedKeyServiceHandler
}

func (service) Stream(_ context.Context, b *connect.BidiStream[kmev1.StreamRequest, kmev1.StreamResponse]) error {
	for {
		m, err := b.Receive()
		if err != nil {
			return nil
		}
		for _, c := range m.Calls {
			a := &kmev1.Answer{Id: c.Id, Answer: &kmev1.Answer_Error{Error: &kmev1.CallError{
				Code: "permission_denied", Reason: string(kme.KMERejected), Message: "the payload is not accepted"}}}
			if q := c.GetPrepareVector(); q != nil {
				a.Answer = &kmev1.Answer_PrepareVector{
					PrepareVector: &kmev1.PrepareVectorResponse{Rands: q.Rands,
						Control: kmev1.Control_PROVISIONING_ONLY, AttemptId: "a1"}}
			}
			if err := b.Send(&kmev1.StreamResponse{Answers: []*kmev1.Answer{a}}); err != nil {
				return err
			}
		}
	}
}

// An HSS asks for a vector, learns that the subscription has no KME, and gives the service what the device has sent.
func Example() {
	_, handler := kmev1connect.NewKeyServiceHandler(service{}) // keysvc, elsewhere
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	trust := server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs

	c, err := client.New(client.Options{
		URLs: []string{server.URL}, // https://HOST:PORT
		// its CA, and the HSS's own certificate
		TLS: &tls.Config{RootCAs: trust, Certificates: server.TLS.Certificates},
	})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	ctx, mme := context.Background(), client.Origin{}
	imsi, err := kme.ParseIMSI("001010123456789")
	if err != nil {
		panic(err)
	}
	imei, err := kme.ParseIMEI("35209900000001")
	if err != nil {
		panic(err)
	}

	vector, err := c.PrepareVector(ctx, imsi, mme, client.RAND{1, 2, 3})
	fmt.Println("let the device in for provisioning only:", vector.AttemptID != "", err)
	_, err = c.EstablishKME(ctx, imsi, mme, imei, vector.AttemptID, make([]byte, 256))
	fmt.Println("refuse the device:", errors.Is(err, client.Reason(kme.KMERejected)))
	fmt.Println(err)
	// Output:
	// let the device in for provisioning only: true <nil>
	// refuse the device: true
	// KME_REJECTED: the payload is not accepted
}
