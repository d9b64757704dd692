package api

import (
	"bytes"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// A codec reads messages as Connect's own does. But it hands on one that cannot be read, marked, so that the guard
// refuses, limits, logs and counts the call: Connect would answer it before, without a reason.
type codec struct {
	name  string
	write func(dst []byte, m proto.Message) ([]byte, error)
	read  func(data []byte, m proto.Message) error
}

// codecs are those of all protocols. A newer client may send fields that this server does not know.
func codecs() (all []connect.HandlerOption) {
	all = append(all, connect.WithCodec(codec{name: "proto", write: proto.MarshalOptions{}.MarshalAppend,
		read: proto.Unmarshal}))
	for _, name := range []string{"json", "json; charset=utf-8"} {
		all = append(all, connect.WithCodec(codec{name: name, write: protojson.MarshalOptions{}.MarshalAppend,
			read: protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal}))
	}
	return all
}

func (c codec) Name() string { return c.name }

func (c codec) Marshal(message any) ([]byte, error) { return c.MarshalAppend(nil, message) }

func (c codec) MarshalAppend(dst []byte, message any) ([]byte, error) {
	return c.write(dst, message.(proto.Message))
}

func (c codec) Unmarshal(data []byte, message any) error {
	m := message.(proto.Message)
	if err := c.read(data, m); err != nil {
		proto.Reset(m)
		m.ProtoReflect().SetUnknown(protowire.AppendString(slices.Clone(unreadable), err.Error()))
	}
	return nil
}

// unreadable begins what marks a message that could not be read: a field that no message has. A client that sends it
// says that its own cannot be.
var unreadable = protowire.AppendTag(nil, protowire.MaxValidNumber, protowire.BytesType)

// checkRead refuses a message that could not be read.
func checkRead(message any) error {
	if m, ok := message.(proto.Message); ok {
		if why, found := bytes.CutPrefix(m.ProtoReflect().GetUnknown(), unreadable); found {
			text, _ := protowire.ConsumeString(why)
			return malformed(fmt.Errorf("the request cannot be read: %.200s", text))
		}
	}
	return nil
}
