// Package udm is for the handlers of a UDM: Nudm_UEAuthentication of 3GPP TS 29.503 with subscriptions that are bound
// to a device. Names of subscriptions, devices and networks are as in its JSON. See docs/5g.md.
package udm

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/kme"
)

// A UDM may be used concurrently.
type UDM struct{ keysvc *client.Client }

// New makes a UDM that calls keysvc by a client.
func New(keysvc *client.Client) UDM { return UDM{keysvc: keysvc} }

// A Vector is what the keys of a SIM give for a RAND (TS 33.102 clause 6.3.2).
type Vector struct {
	RAND, AUTN, CK, IK [16]byte
	XRES               []byte
}

// An AV is a 5G HE AV (TS 33.501 clause 6.1.3.2.0). Its JSON is an Av5GHeAka.
type AV struct {
	RAND     client.RAND // to send: encrypted under KME where the subscription has one
	AUTN     [16]byte
	XRESStar [16]byte
	KAUSF    [32]byte

	// Not empty: the subscription has no KME. Let the device in for provisioning only, and give this with its payload.
	AttemptID string
}

// GenerateAuthData makes the 5G HE AV of a subscription for a serving network. RAND is one that the subscription never
// had before.
func (u UDM) GenerateAuthData(ctx context.Context, supi, servingNetwork string, v Vector) (AV, error) {
	imsi, origin, err := who(supi, servingNetwork)
	if err == nil && (len(v.XRES) < 4 || len(v.XRES) > 16) { // TS 33.102 clause 6.3.7
		err = fmt.Errorf("XRES has 4 to 16 bytes; this has %d", len(v.XRES))
	}
	if err != nil {
		return AV{}, err
	}
	prepared, err := u.keysvc.PrepareVector(ctx, imsi, origin, v.RAND)
	if err != nil {
		return AV{}, err
	}
	return AV{
		RAND: prepared.RANDs[0], AUTN: v.AUTN, XRESStar: v.xresStar(servingNetwork), KAUSF: v.kausf(servingNetwork),
		AttemptID: prepared.AttemptID,
	}, nil
}

// RestoreRAND gives the RAND with which the SIM has made AUTS, for the RAND of resynchronizationInfo.
func (u UDM) RestoreRAND(ctx context.Context, supi, servingNetwork string, rand client.RAND) (client.RAND, error) {
	imsi, origin, err := who(supi, servingNetwork)
	if err != nil {
		return client.RAND{}, err
	}
	return u.keysvc.RestoreRAND(ctx, imsi, origin, rand)
}

// ConfirmAuth is called with the AuthEvent of an AUSF. It says whether the device may be served: if not, it may
// provision only. It is not called with an event that has authRemovalInd.
func (u UDM) ConfirmAuth(ctx context.Context, supi, servingNetwork string, success bool) (served bool, err error) {
	imsi, origin, err := who(supi, servingNetwork)
	if err != nil {
		return false, err
	}
	report, err := u.keysvc.ReportAuthentication(ctx, imsi, origin, success)
	return report.Served, err
}

// Provision takes a device's payload and gives NW_SIG for the device. The payload came from the serving network that
// was given the attempt.
func (u UDM) Provision(ctx context.Context, supi, servingNetwork, pei, attemptID string, payload []byte) (
	nwSig [32]byte, err error) {
	imsi, origin, err := who(supi, servingNetwork)
	if err != nil {
		return nwSig, err
	}
	imei, err := kme.ParsePEI(pei)
	if err != nil {
		return nwSig, err
	}
	e, err := u.keysvc.EstablishKME(ctx, imsi, origin, imei, attemptID, payload)
	e.KME.Wipe()
	return e.NWSig, err
}

func who(supi, servingNetwork string) (imsi kme.IMSI, o client.Origin, err error) {
	if imsi, err = kme.ParseSUPI(supi); err == nil {
		o, err = Origin(servingNetwork)
	}
	return imsi, o, err
}

// servingNetworkName is that of a PLMN, or of an SNPN with its NID (TS 24.501 clause 9.12.1).
var servingNetworkName = regexp.MustCompile(
	`^5G:(mnc[0-9]{3}\.mcc[0-9]{3}\.3gppnetwork\.org)(?::([0-9A-F]{11}))?$`)

// Origin names a serving network for keysvc, in the form of a home network's name (TS 23.003 clause 28.2). A UDM is not
// told which AMF asks. Without a PLMN (5G:NSWO) there is none.
func Origin(servingNetwork string) (client.Origin, error) {
	m := servingNetworkName.FindStringSubmatch(servingNetwork)
	if m == nil {
		return client.Origin{}, fmt.Errorf("%q is not the name of a serving network, 5G:mncMMM.mccCCC.3gppnetwork.org",
			servingNetwork)
	}
	name := "5gc." + m[1]
	if m[2] != "" {
		name = "5gc.nid" + m[2] + "." + m[1]
	}
	o, err := kme.ParseOrigin(name)
	return client.Origin{Name: o}, err
}

// xresStar is TS 33.501 Annex A.4. RAND is the decrypted one, with which SIM and device compute RES*.
func (v *Vector) xresStar(servingNetwork string) [16]byte {
	k := v.kdf(0x6b, []byte(servingNetwork), v.RAND[:], v.XRES)
	return [16]byte(k[16:])
}

// kausf is TS 33.501 Annex A.2; AUTN begins with SQN xor AK.
func (v *Vector) kausf(servingNetwork string) [32]byte {
	return v.kdf(0x6a, []byte(servingNetwork), v.AUTN[:6])
}

// kdf is that of TS 33.220 Annex B.2, of CK || IK.
func (v *Vector) kdf(fc byte, parameters ...[]byte) [32]byte {
	var key [32]byte
	copy(key[copy(key[:], v.CK[:]):], v.IK[:])
	defer clear(key[:])
	h := hmac.New(sha256.New, key[:])
	h.Write([]byte{fc})
	for _, p := range parameters {
		h.Write(p)
		h.Write(binary.BigEndian.AppendUint16(nil, uint16(len(p))))
	}
	return [32]byte(h.Sum(nil))
}

// HXRESStar is what an AUSF computes from a 5G HE AV, and what an AMF compares HRES* with (TS 33.501 Annex A.5). RAND
// is the one that was sent: neither knows another.
func HXRESStar(rand, xresStar [16]byte) [16]byte {
	sum := sha256.Sum256(append(rand[:], xresStar[:]...))
	return [16]byte(sum[16:])
}

// MarshalJSON gives an Av5GHeAka of Nudm_UEAuthentication (TS 29.503 clause 6.3.6.2.5).
func (a AV) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]string{"avType": "5G_HE_AKA", "rand": hex.EncodeToString(a.RAND[:]),
		"autn": hex.EncodeToString(a.AUTN[:]), "xresStar": hex.EncodeToString(a.XRESStar[:]),
		"kausf": hex.EncodeToString(a.KAUSF[:])})
}
