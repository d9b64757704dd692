package mesim

import (
	"bufio"
	"context"
	"crypto/aes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/internal/usage"
	"github.com/kmehsm/kmehsm/kme"
)

// An MME is the test MME of plugins/freediameter: lines of text over a Unix socket, which it sends on as S6a requests.
// It may be used concurrently.
type MME struct {
	conn net.Conn

	mu   sync.Mutex
	next int // guarded by mu
	// guarded by mu: the fields of the answer, without its id; closed when the MME has gone
	waiting map[int]chan<- []string
}

// DialMME connects to the one that listens on a socket.
func DialMME(path string) (*MME, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	m := &MME{conn: conn, waiting: map[int]chan<- []string{}}
	go m.read()
	return m, nil
}

func (m *MME) read() {
	lines := bufio.NewScanner(m.conn)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 {
			continue
		}
		id, _ := strconv.Atoi(fields[1])
		m.mu.Lock()
		answer := m.waiting[id]
		delete(m.waiting, id)
		m.mu.Unlock()
		if answer != nil {
			answer <- append(fields[:1:1], fields[2:]...)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, answer := range m.waiting {
		close(answer)
	}
	m.waiting = nil
}

// Ask sends a request, as plugins/freediameter/test/mme_lines.c describes it, and gives the fields of its answer
// without the id.
func (m *MME) Ask(ctx context.Context, command string, args ...string) ([]string, error) {
	answer := make(chan []string, 1)
	m.mu.Lock()
	if m.waiting == nil {
		m.mu.Unlock()
		return nil, errors.New("the MME has gone")
	}
	m.next++
	m.waiting[m.next] = answer
	_, err := fmt.Fprintf(m.conn, "%s %d %s\n", command, m.next, strings.Join(args, " "))
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case fields, ok := <-answer:
		switch {
		case !ok:
			return nil, errors.New("the MME has gone")
		case fields[0] == "ERR":
			return nil, fmt.Errorf("the MME got no answer: %s", strings.Join(fields[1:], " "))
		}
		return fields, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// A resultError is an S6a answer that is no success. Its status is that of Binding-Answer, if it has one.
type resultError struct{ result, status string }

func (e resultError) Error() string {
	return fmt.Sprintf("the answer's result is %s, Binding-Status %s", e.result, e.status)
}

// What Binding-Control and Result-Code are in lines of the MME.
const (
	success          = "2001"
	provisioningOnly = "1"
	preprocessed     = "2"
)

// A vector is an E-UTRAN authentication vector as it comes from the HSS.
type vector struct {
	rand       [aes.BlockSize]byte
	xres, autn []byte
}

// vectors asks for one vector. resync is RAND and AUTS, or nil.
func (m *MME) vectors(
	ctx context.Context, imsi kme.IMSI, resync []byte,
) (v vector, control, attempt string, err error) {
	info := "-"
	if resync != nil {
		info = hex.EncodeToString(resync)
	}
	f, err := m.Ask(ctx, "AIR", imsi.String(), "1", info)
	if err != nil {
		return v, "", "", err
	}
	if len(f) < 4 || f[1] != success {
		return v, "", "", resultError{result: f[1], status: "-"}
	}
	if len(f) != 5 {
		return v, "", "", fmt.Errorf("AIA has %d vectors, not one", len(f)-4)
	}
	parts := strings.Split(f[4], ":")
	if len(parts) != 4 {
		return v, "", "", errors.New("the MME's line is no vector")
	}
	rand, err := hex.DecodeString(parts[0])
	if err != nil || len(rand) != len(v.rand) {
		return v, "", "", errors.New("RAND has not 16 bytes")
	}
	v.rand = [aes.BlockSize]byte(rand)
	xres, xerr := hex.DecodeString(parts[1])
	autn, aerr := hex.DecodeString(parts[2])
	v.xres, v.autn = xres, autn
	return v, f[2], f[3], errors.Join(xerr, aerr)
}

// update sends ULR: with a payload and its attempt, or with "-" for both. It gives NW_SIG.
func (m *MME) update(
	ctx context.Context, imsi kme.IMSI, imei kme.IMEI, payload, attempt string,
) (nwSig []byte, err error) {
	f, err := m.Ask(ctx, "ULR", imsi.String(), imei.String(), payload, attempt)
	if err != nil {
		return nil, err
	}
	if len(f) != 5 || f[1] != success || f[2] != "-" && f[2] != "0" {
		return nil, resultError{result: f[1], status: f[min(2, len(f)-1)]}
	}
	if payload != "-" && f[4] != "-" {
		return nil, errors.New("the answer to a payload has a subscription: it allows a bearer")
	}
	if f[3] == "-" {
		return nil, nil
	}
	return hex.DecodeString(f[3])
}

// ReadSIMs reads a file with a subscriber a line: IMSI, K and OPc. What the test HSS reads behind them is not for SIMs.
func ReadSIMs(path string) (map[kme.IMSI]*milenage.SIM, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sims := map[kme.IMSI]*milenage.SIM{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) < 3 {
			return nil, fmt.Errorf("%s: a line begins with IMSI, K and OPc", path)
		}
		imsi, err := kme.ParseIMSI(fields[0])
		k, kerr := hex.DecodeString(fields[1])
		opc, oerr := hex.DecodeString(fields[2])
		if err := errors.Join(err, kerr, oerr); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if sims[imsi], err = milenage.New(k, opc); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return sims, nil
}

// authenticate is AKA: the SIM checks the network, and the MME the SIM.
func authenticate(sim *milenage.SIM, rand [aes.BlockSize]byte, v vector) (sqn uint64, err error) {
	res, sqn, err := sim.Authenticate(rand, v.autn)
	if err == nil && string(res[:]) != string(v.xres) {
		err = errors.New("RES is not XRES: the MME refuses the SIM")
	}
	return sqn, err
}

// playS6a is the message flow of TR 33.868, as MME, device and SIM see it, over a real Diameter stack.
func (a *attaching) playS6a(ctx context.Context, imsi kme.IMSI, imei kme.IMEI, m *Message) error {
	sim := a.SIMs[imsi]
	if sim == nil {
		return usage.In("subscribers", fmt.Errorf("there is no IMSI %s in it", imsi))
	}
	v, control, attempt, err := a.MME.vectors(ctx, imsi, nil)
	if err != nil {
		return err
	}
	if control != provisioningOnly || attempt == "-" {
		return fmt.Errorf("IMSI %s is bound already, or nobody says PROVISIONING_ONLY: Binding-Control is %s",
			imsi, control)
	}
	if _, err := authenticate(sim, v.rand, v); err != nil {
		return fmt.Errorf("with a RAND that is not encrypted: %w", err)
	}
	var nwSig []byte
	err = a.timed(func() error {
		nwSig, err = a.MME.update(ctx, imsi, imei, hex.EncodeToString(m.Payload), attempt)
		return err
	})
	if err != nil {
		return err
	}
	if len(nwSig) != sha256.Size {
		return fmt.Errorf("NW_SIG has %d bytes, not %d", len(nwSig), sha256.Size)
	}
	if err := m.check([sha256.Size]byte(nwSig)); err != nil {
		return err
	}
	// Pre-processed from now on. Once the SIM asks for resynchronisation, with the RAND that the MME has, and
	// AUTS of the one that it gets.
	for _, resynchronise := range []bool{true, false} {
		if v, control, _, err = a.MME.vectors(ctx, imsi, nil); err != nil {
			return err
		}
		if control != preprocessed {
			return fmt.Errorf("after NW_SIG Binding-Control is %s", control)
		}
		rand, err := m.decrypt(v.rand)
		if err != nil {
			return err
		}
		sqn, err := authenticate(sim, rand, v)
		if err != nil {
			return fmt.Errorf("with the RAND decrypted under KME: %w", err)
		}
		if !resynchronise {
			break
		}
		auts := sim.Resynchronise(rand, sqn+1<<20)
		if v, _, _, err = a.MME.vectors(ctx, imsi, append(v.rand[:], auts[:]...)); err != nil {
			return fmt.Errorf("resynchronisation: %w", err)
		}
		if rand, err = m.decrypt(v.rand); err != nil {
			return err
		}
		again, err := authenticate(sim, rand, v)
		if err != nil || again <= sqn+1<<20 {
			return fmt.Errorf("after resynchronisation to SQN %d the HSS uses %d: %w", sqn+1<<20, again, err)
		}
	}
	_, err = a.MME.update(ctx, imsi, imei, "-", "-")
	return err
}

// reasonOfS6a names the refusals of S6a; empty for any other error.
func reasonOfS6a(err error) string {
	e, ok := errors.AsType[resultError](err)
	if ok && e.status != "-" {
		return e.result + "/" + e.status
	}
	return e.result
}
