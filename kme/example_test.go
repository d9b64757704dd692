package kme_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"math/big"

	"github.com/kmehsm/kmehsm/kme"
)

// The device makes a KME, and its home network gets it. The lot's private key and the device's are in software here; in
// a network and on a line they never leave a token.
func Example() {
	lot, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	device, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	const suite = kme.SuiteECDSA
	about := kme.Context{Lot: "L1"} // the bound suite signs it too

	// The device.
	made := kme.Plaintext{KME: kme.RandomSecret(), RME: kme.RandomSecret()}
	defer made.Wipe()
	if made.Sig, err = suite.Sign(device, suite.Signed(about, &made)); err != nil {
		panic(err)
	}
	payload, err := suite.Encrypt(&lot.PublicKey, &made)
	if err != nil {
		panic(err)
	}

	// The network.
	reduced, inRange, err := kme.ReducePayload(&lot.PublicKey, payload)
	if err != nil {
		panic(err)
	}
	raw := new(big.Int).Exp(new(big.Int).SetBytes(reduced), lot.D, lot.N).FillBytes(make([]byte, len(reduced)))
	got, wellFormed := suite.Split(raw)
	defer got.Wipe()
	clear(raw)
	fmt.Println("accepted:", inRange && wellFormed && suite.Verify(device.Public(), suite.Signed(about, &got), got.Sig))

	// The device compares NW_SIG, and activates the KME.
	fmt.Println("activated:", got.NWSig() == made.NWSig())
	fmt.Println("printed:", got.KME)
	// Output:
	// accepted: true
	// activated: true
	// printed: [secret]
}

func ExampleParseIMEI() {
	imei, err := kme.ParseIMEI("490154203237518") // with its check digit
	fmt.Println(imei, imei.TAC(), imei.SNR(), err)
	_, err = kme.ParseIMEI("490154203237519")
	fmt.Println(err)
	// Output:
	// 49015420323751 49015420 323751 <nil>
	// the IMEI's check digit is 9, but its other digits make 8: check for a typing error
}
